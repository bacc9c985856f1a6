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
_BOXED = re.compile(
    r"(?P<left>(?:\x1b\[[0-9;]*m)*│(?:\x1b\[[0-9;]*m)*)(?P<text>.*?)(?P<right>(?:\x1b\[[0-9;]*m)*│(?:\x1b\[[0-9;]*m)*)"
)
"""A line in a box of tyro's."""


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
        for line in joined(printed.getvalue().splitlines()):
            shown = _COLOUR.sub("", line)
            is_prose = len(shown) > WIDTH and shown[0].isascii() and shown[0] != " "
            print(filled(line) if is_prose else line)


def joined(lines: Sequence[str]) -> list[str]:
    """Lines of help whose texts in boxes break where the box ends, and not where the docstring breaks."""
    found: list[str] = []
    for line in lines:
        rest: str | None = line
        while rest is not None and found and (moved := _with_word_moved(found[-1], rest)):
            found[-1], rest = moved
        if rest is not None:
            found.append(rest)
    return found


def _with_word_moved(above: str, below: str) -> tuple[str, str | None] | None:
    """Two lines after the first word of the lower one went up, if it continues the text above and fits; else None."""
    boxes = _BOXED.fullmatch(above), _BOXED.fullmatch(below)
    if not (boxes[0] and boxes[1] and boxes[1]["text"].strip()):
        return None
    (upper, plain_upper), (lower, plain_lower) = ((box["text"], _COLOUR.sub("", box["text"])) for box in boxes if box)
    word, *others = lower.split(maxsplit=1)
    indent = len(plain_lower) - len(plain_lower.lstrip())
    # The upper text may begin beside the name of its option.
    beside = re.match(r" *-\w*\S*.*? {2,}(?=\S)|", plain_upper)
    start = beside.end() if beside and beside.end() else len(plain_upper) - len(plain_upper.lstrip())
    is_name = plain_lower.lstrip().startswith(("-", "─")) or (plain_upper.lstrip().startswith("-") and not beside)
    width, kept = len(plain_upper), f"{upper.rstrip()} {word}"
    if is_name or indent != start or len(_COLOUR.sub("", kept)) >= width:
        return None

    def boxed(box: re.Match[str], text: str) -> str:
        return f"{box['left']}{text}{' ' * (width - len(_COLOUR.sub('', text)))}{box['right']}"

    rest = boxed(boxes[1], " " * indent + others[0].rstrip()) if others and others[0].strip() else None
    return boxed(boxes[0], kept), rest


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
