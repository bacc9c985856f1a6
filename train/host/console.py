"""What a person sees while a run goes on, a bar in a terminal, plain lines elsewhere, and of its table at the end."""

import logging
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 10**6
"""Columns of a console in which every table fits."""


def print_table(console: Console, table: Table) -> None:
    """Prints a table with every cell whole, in lines longer than the console's where it must be."""
    needed = console.measure(table, options=console.options.update(max_width=_UNBOUNDED)).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def quiet_libraries() -> None:
    """Keep orbax from logging pages of traceback for an error that it also raises."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


class Display:
    """Shows steps and lines.  Use it in a `with` statement, once for all epochs of a variant.

    Up to the first step, while the program is compiled, it says so with the time that has passed; then there is a bar.
    """

    def __init__(self, console: Console, title: str, *, steps: int, done: int):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            _Compiling(),
            *(_WhenStarted(column) for column in (BarColumn(), MofNCompleteColumn())),
            TimeElapsedColumn(),
            _WhenStarted(TimeRemainingColumn()),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=steps, completed=done, started=False)

    def __enter__(self) -> Self:
        self._bar.start()
        # Ctrl-C may end the process at any moment, which then cannot show it again.
        self._console.show_cursor(True)
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def step(self, count: int = 1) -> None:
        """So many more steps were started."""
        self._bar.update(self._task, started=True)
        self._bar.advance(self._task, count)

    def line(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Compiling(ProgressColumn):
    """A column that says what is waited for before the first step."""

    def render(self, task: Task) -> Text:
        return Text("" if task.fields["started"] else "compiling")


class _WhenStarted(ProgressColumn):
    """Shows another column from the first step on."""

    def __init__(self, column: ProgressColumn):
        super().__init__()
        self._column = column

    def render(self, task: Task):
        return self._column(task) if task.fields["started"] else Text("")
