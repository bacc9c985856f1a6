"""The table of results."""

import io
from pathlib import Path

from rich.console import Console

from train.commands.cli import load_recipes
from train.host.console import print_table
from train.tasks.images_summary import _table


def test_the_table_of_many_variants_is_whole_where_lines_are_short():
    digits = load_recipes(Path(__file__).parents[3] / "configs" / "digits.py")["smoothing"]
    results = {variant.name: {"parameters": 272186, "accuracy": 0.9875} for variant in digits.variants}
    printed = io.StringIO()
    print_table(Console(file=printed, width=80), _table(digits, results))
    lines = printed.getvalue().splitlines()
    assert sum(line.count("272,186") for line in lines) == sum(line.count("98.75%") for line in lines) == 7
    assert len({len(line) for line in lines[1:]}) == 1
