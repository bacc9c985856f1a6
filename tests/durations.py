"""Which tests `make test-fast` leaves out: `make durations` runs all tests and writes tests/slow.txt.

A pytest plugin, given by `-p tests.durations`. Times are processor time, of child processes too, so that other work
on the machine does not count. Tests that share a function, or a fixture of their file, share its time.
"""

import os
from collections import Counter
from pathlib import Path

SLOW = Path(__file__).parent / "slow.txt"

BUDGET = 75.0
"""Seconds of processor time that the fast tests take together."""

HEADER = f"""\
# Test functions by the processor seconds that all their tests take, written by `make durations`.
# `make test-fast` leaves them out. The others take {BUDGET:.0f} s together.
"""


def function_of(nodeid: str) -> str:
    """The test function of a test: its id without parameters."""
    return nodeid.partition("[")[0]


def slow_functions(seconds: dict[str, float], budget: float = BUDGET) -> dict[str, float]:
    """The functions that are left out so that the others, the quickest ones, fit into the budget."""
    spent, slow = 0.0, {}
    for name in sorted(seconds, key=seconds.__getitem__):
        spent += seconds[name]
        if spent > budget:
            slow[name] = seconds[name]
    return slow


def written(slow: dict[str, float]) -> str:
    """The text of tests/slow.txt."""
    return HEADER + "".join(f"{seconds:.1f} {name}\n" for name, seconds in sorted(slow.items()))


def listed(text: str) -> set[str]:
    """The functions that such a text lists."""
    return {line.split()[1] for line in text.splitlines() if line and not line.startswith("#")}


def now() -> float:
    """Processor seconds of this process and of its ended children."""
    return sum(os.times()[:4])


class Durations:
    """Adds up the time from the end of one test to the end of the next, and writes the list at the end."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.last = now()

    def pytest_collection_finish(self):
        self.last = now()  # imports are of no test

    def pytest_runtest_logfinish(self, nodeid):
        self.seconds[function_of(nodeid)] += now() - self.last
        self.last = now()

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus == 0:
            SLOW.write_text(written(slow_functions(self.seconds)))


def pytest_configure(config):
    config.pluginmanager.register(Durations())
