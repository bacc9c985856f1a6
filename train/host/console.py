"""What a person sees while a run goes on, a bar in a terminal, plain lines elsewhere, and of its table at the end."""

from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_UNBOUNDED = 10**6
"""Columns of a console in which every table fits."""


def print_table(console: Console, table: Table) -> None:
    """Prints a table with every cell whole, in lines longer than the console's where it must be."""
    needed = console.measure(table, options=console.options.update(max_width=_UNBOUNDED)).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


class Display:
    """Shows steps and lines.  Use it in a `with` statement, once for all epochs of a variant."""

    def __init__(self, console: Console, title: str, *, steps: int, done: int):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=steps, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def step(self, count: int = 1) -> None:
        """So many more steps were started."""
        self._bar.advance(self._task, count)

    def line(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
