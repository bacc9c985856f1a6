"""A command's options from the command line, and its help in lines that a plain terminal shows whole."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

WIDTH = 80
"""Columns of a plain terminal."""

Options = TypeVar("Options")

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def parse(options: type[Options], arguments: Sequence[str], *, prog: str, **more: Any) -> Options:
    """Read the options of a command, the fields of a dataclass.

    Args:
      options: The dataclass.
      arguments: What follows the command.
      prog: What messages call the command.
      more: Passed on to `tyro.cli`.

    Raises:
      ValueError: The dataclass refuses a value.
      SystemExit: An option is unknown or wrong, or help was asked for; it is printed.
    """
    printed = _LikeStdout()
    try:
        with contextlib.redirect_stdout(printed):
            return tyro.cli(options, args=list(arguments), prog=prog, **more)
    finally:
        # tyro itself fits the boxes of options to the terminal, and neither the usage nor the description.
        for line in printed.getvalue().splitlines():
            shown = _COLOUR.sub("", line)
            is_prose = len(shown) > WIDTH and shown[0].isascii() and shown[0] != " "
            print(filled(line) if is_prose else line)


def filled(paragraph: str) -> str:
    """The paragraph in lines of at most `WIDTH`, as far as its words go; a terminal's colours take no room."""
    lines = [""]
    for word in paragraph.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if not lines[-1] or len(_COLOUR.sub("", longer)) <= WIDTH:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


class _LikeStdout(io.StringIO):
    """Text for what the standard output is, so that its colours and its frames stay."""

    def __init__(self):
        super().__init__()
        self._stdout = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in typeshed, read-only here
        return self._stdout.encoding

    def isatty(self) -> bool:
        return self._stdout.isatty()
