"""Repeat a finished run from its saved configuration and say whether the result is identical."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

import qpde
from qpde.trained import DESCRIPTION
from train.runs.directory import (
    METRICS,
    SUMMARY,
    read_experiment,
    read_lines,
    read_results,
    start_changes,
)
from train.tasks.job import prepare_job
from train.trained.finished import check_data

_CLOCK = ("seconds", "training_seconds")
"""What two equal runs may differ in."""

_COMPARED = {METRICS: read_lines, SUMMARY: read_results}


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Repeat a finished run from its saved configuration and say whether the result is identical.

    The repeated run is written to INTO/NAME. The same command continues it after an interruption. Metrics, results and
    trained networks are compared bit by bit; only the times may differ. If anything else differs, the exit status is 1.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    into: Path = Path("reproduced")
    """Folder that the repeated run is written to."""
    overwrite: bool = False
    """Delete an earlier repeated run."""


def prepare_reproduce(options: Reproduce) -> Callable[[Console], int]:
    """The repetition, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run, one of its files is damaged, its configuration cannot be
        run here, it was trained on other data than those that are here, or the run that it started from has changed.
    """
    for read in _COMPARED.values():
        read(options.run)
    networks = [qpde.load(folder) for folder in _networks(options.run)]  # a damaged one is found now, not after hours
    experiment = read_experiment(options.run)
    for what, (then, now) in start_changes(options.run, experiment).items():
        raise ValueError(f"{options.run} cannot be repeated: {what} was {then!r} then and is {now!r} now")
    if options.into.resolve() == options.run.resolve().parent:
        raise ValueError(f"--into (={options.into}) is where the run itself lies: choose another folder")
    job = prepare_job(
        experiment,
        data_dir=options.data_dir,
        runs_dir=options.into,
        overwrite=options.overwrite,
        elsewhere="--into",
        check=lambda training: check_data(options.run, training.fingerprint, networks),
    )

    def reproduce(console: Console) -> int:
        job(console)
        found = list(differences(options.run, options.into / experiment.name))
        for difference in found:
            console.print(f"differs: {difference}", markup=False, highlight=False, soft_wrap=True)
        verdict = f"{len(found)} differences from" if found else "identical to"
        console.print(f"{verdict} {options.run}", markup=False, highlight=False, soft_wrap=True)
        return 1 if found else 0

    return reproduce


def differences(run: Path, other: Path) -> Iterator[str]:
    """What two finished runs differ in, a line each: a value of metrics or summary, or a parameter's largest change."""
    for file, read in _COMPARED.items():
        mine, theirs = (_without_clock(read(folder)) for folder in (run, other))
        yield from (f"{file}{place}: {a} and {b}" for place, a, b in _unequal(mine, theirs))
    for folder in _networks(run):
        mine, theirs = qpde.load(folder), qpde.load(other / folder.relative_to(run))
        for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (mine.variables, theirs.variables)), strict=True):
            if not np.array_equal(a, b, equal_nan=True):
                largest = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
                yield f"{folder.relative_to(run)} {jax.tree_util.keystr(path)}: by up to {largest:.3g}"


def _networks(run: Path) -> list[Path]:
    """The folders of a run's trained networks."""
    return sorted(path.parent for path in run.rglob(DESCRIPTION))


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(inner) for key, inner in value.items() if key not in _CLOCK}
    return [_without_clock(inner) for inner in value] if isinstance(value, list) else value


def _unequal(a: Any, b: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf in which two trees of JSON differ, with its place."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _unequal(a.get(key), b.get(key), f"{place}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (inner_a, inner_b) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(inner_a, inner_b, f"{place}[{i}]")
    elif a != b:
        yield place, a, b
