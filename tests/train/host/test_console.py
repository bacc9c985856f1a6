"""What a terminal shows while a program is compiled, and afterwards."""

import io

import pytest
from rich.console import Console

from train.host.console import Display

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def _shown(display):
    """The bar's line as it stands."""
    console = Console(file=io.StringIO(), width=100)
    console.print(display._bar.get_renderable())
    return console.file.getvalue()


@pytest.mark.parametrize("done", [0, 5])
def test_before_the_first_step_it_says_that_it_compiles_and_for_how_long(done):
    display = Display(Console(file=io.StringIO(), force_terminal=True), "plain", steps=15, done=done)
    before = _shown(display)
    assert "plain compiling" in " ".join(before.split())
    assert "0:00:00" in before
    assert "/15" not in before
    assert "━" not in before
    display.step()
    after = _shown(display)
    assert "compiling" not in after
    assert f"{done + 1}/15" in after
    assert "━" in after


def test_the_cursor_is_there_while_the_bar_is_for_a_signal_may_end_the_program_at_any_moment():
    printed = io.StringIO()
    with Display(Console(file=printed, force_terminal=True), "plain", steps=15, done=0):
        assert printed.getvalue().rfind(SHOW) > printed.getvalue().rfind(HIDE)


def test_a_file_gets_lines_and_no_bar():
    printed = io.StringIO()
    with Display(Console(file=printed), "plain", steps=15, done=0) as display:
        display.step()
        display.line("[a line]")
    assert printed.getvalue() == "[a line]\n"
