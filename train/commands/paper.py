"""The experiments of a file one after the other, as far as the time reaches, and one document of their results."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from train.config.graphs import GraphExperiment
from train.config.images import Experiment
from train.config.recipe_files import load_recipes
from train.host.interrupt import Interrupted
from train.runs.directory import SUMMARY, read_lines, read_results, unfinished
from train.tasks import images_summary, nodes_summary
from train.tasks.job import prepare_job

DOCUMENT = "results.md"

_AGAIN = 2.0  # seconds after which a training that has not yet listened is asked again to stop

Recipes = Mapping[str, Experiment | GraphExperiment]


@dataclasses.dataclass(frozen=True)
class Paper:
    """Run the experiments behind the paper's claims, the most important first, for the given number of minutes.

    The same command continues where the last one stopped, and never repeats a finished experiment. Each experiment gets
    a run's folder. results.md holds their tables and figures, the commands that make them, and a list of the
    experiments that were not run.
    """

    config: Annotated[Path, tyro.conf.Positional] = Path("configs/paper.py")
    """File whose recipes are run, in their order."""
    minutes: float = 60.0
    """Time for all of it. A training that is not done by then is saved."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    runs_dir: Path = Path("runs/paper")
    """Where the folders and results.md go."""


def prepare_paper(options: Paper) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: No time, no such file, two recipes of one name, or a folder that holds a run of another
        experiment or a damaged one.
    """
    if not options.minutes > 0:
        raise ValueError(f"--minutes (={options.minutes}) must be positive")
    recipes: Recipes = load_recipes(options.config)
    names = [experiment.name for experiment in recipes.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{options.config} names two experiments {twice[0]!r}: their runs would share a folder")
    missing = unfinished(options.runs_dir, list(recipes.values()), advice="choose another --runs-dir")
    for experiment in recipes.values():
        if experiment not in missing:
            read_results(options.runs_dir / experiment.name)

    def work(console: Console) -> None:
        began = time.monotonic()
        with _time_limit(60 * options.minutes) as is_over:
            for experiment in missing:
                if is_over():
                    break
                console.print(f"{experiment.name}", markup=False, highlight=False)
                job = prepare_job(experiment, data_dir=options.data_dir, runs_dir=options.runs_dir)
                try:
                    job(console)
                except Interrupted:
                    if not is_over():
                        raise
        left = len(unfinished(options.runs_dir, list(recipes.values()), advice=""))
        path = options.runs_dir / DOCUMENT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(options, recipes), encoding="utf-8")
        minutes = (time.monotonic() - began) / 60
        said = f"{len(recipes) - left} of {len(recipes)} experiments are finished after {minutes:.0f} minutes"
        console.print(f"{said}; written to {path}", markup=False, highlight=False, soft_wrap=True)

    return work


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[Callable[[], bool]]:
    """Ask the training in hand to stop, as SIGTERM does, when the time is over; yields whether it is.

    Between trainings nobody listens to a signal, so it is sent again until the training that begins then has saved its
    state. A SIGTERM from outside ends the process as ever.
    """
    over, done = threading.Event(), threading.Event()

    def note(number, frame):
        if not over.is_set():
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)

    def watch():
        if _passes(seconds, done):
            over.set()
            while not done.wait(_AGAIN):
                signal.raise_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("`paper` stops trainings by a signal, which Python hands to the main thread: call it there")
    before = signal.signal(signal.SIGTERM, note)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield over.is_set
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)


def _passes(seconds: float, done: threading.Event) -> bool:
    """Wait; whether so many seconds passed before all was done."""
    return not done.wait(seconds)


def document(options: Paper, recipes: Recipes) -> str:
    """Tables and figures of the finished experiments with their commands, and a list of the others, as Markdown.

    Args:
      options: The command's.
      recipes: Experiments by recipe.
    """
    parts, waiting = ["# What was measured\n"], []
    for recipe, experiment in recipes.items():
        run = options.runs_dir / experiment.name
        command = f"python -m train run {options.config} --recipe {recipe} --runs-dir {options.runs_dir}"
        if not (run / SUMMARY).is_file():
            waiting.append((experiment.name, _progress(run, experiment)))
            continue
        results = read_results(run)
        summary = images_summary if isinstance(experiment, Experiment) else nodes_summary
        pictures = "\n".join(f"![{path.stem}]({experiment.name}/{path.name})" for path in sorted(run.glob("*.png")))
        table = _markdown(summary.cells(experiment, results))
        parts.append(f"## {experiment.name}\n\n`{command}`\n\n{table}\n\n{pictures}\n")
    if waiting:
        listed = "\n".join(f"- {name}: {how_far}" for name, how_far in waiting)
        parts.append(f"## Not run\n\n{listed}\n")
    return "\n".join(parts)


def _progress(run: Path, experiment: Experiment | GraphExperiment) -> str:
    """How far an unfinished experiment is."""
    lines = read_lines(run)
    if not lines:
        return "not begun"
    return f"begun; {lines[-1]['variant']} after epoch {lines[-1]['epoch']} of {experiment.epochs}"


def _markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    marks = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *body))
