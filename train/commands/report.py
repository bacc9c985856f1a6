"""`python -m train report`: the page of one run or of several."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from train.config.graphs import GraphExperiment
from train.config.images import Experiment, check_at_least
from train.page import graph_sections, image_sections
from train.page.html import page
from train.runs.directory import read_experiment, read_results
from train.tasks.images_summary import check_drawable
from train.trained.figures import measure
from train.trained.finished import read_finished

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Report:
    """Show what finished runs measured, and measure more, on one page.

    Writes report.html, which holds its figures and needs no network, and the figures as PNG files, into RUN/report of
    the first run.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs: one or several on images, or one on a graph."""
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    """Bits of activations to run the networks at."""
    certify: tuple[int, ...] = (8, 6, 4)
    """Bits of activations to certify predictions at."""
    images: int = 500
    """Test images to measure on, from the first on."""
    data_dir: Path | None = None
    """Root of the data. Without it the environment variable QPDE_DATA_DIR counts."""
    output: Path | None = None
    """Where the page goes instead."""


def prepare_report(options: Report) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: no finished runs are there, they do not fit on one page, or an option is out of range.
    """
    check_at_least("images", options.images, 1)
    for name, given, most in (("bits", options.bits, 32), ("certify", options.certify, 15)):
        if outside := [bits for bits in given if not 2 <= bits <= most]:
            raise ValueError(f"--{name} holds {outside[0]}: give bits from 2 to {most}")
    if not options.runs:
        raise ValueError("name a run: report runs/digits")
    if not options.bits:
        raise ValueError("--bits is empty: give some, such as --bits 2 4 8")
    if len({run.resolve().name for run in options.runs}) < len(options.runs):
        raise ValueError("two runs have the same name, which is what tells their networks apart: leave one out")
    experiments = {run: read_experiment(run) for run in options.runs}
    on_graph = [run for run, experiment in experiments.items() if isinstance(experiment, GraphExperiment)]
    if on_graph and len(options.runs) > 1:
        raise ValueError(f"{on_graph[0]} is a run on a graph: give it a page of its own")
    results = {run: read_results(run) for run in options.runs}
    folder = options.output or options.runs[0] / "report"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: choose another --output")
    first = experiments[options.runs[0]]
    if isinstance(first, GraphExperiment):
        (of_graph,) = results.values()
        return _work(experiments, of_graph, folder, lambda _: graph_sections.sections(first, of_graph, folder))

    named = {_name(run, variant, options): r for run, variants in results.items() for variant, r in variants.items()}
    check_drawable(named)
    found = {
        _name(run, variant, options): finished
        for run in options.runs
        for variant, finished in read_finished(run, options.data_dir).items()
    }

    for finished in found.values():
        if finished.model.act_bits is not None:
            finished.check_levels(options.bits + options.certify)

    def sections(console: Console) -> list[tuple[str, str]]:
        measured = {}
        for name, finished in found.items():
            console.print(f"measuring {name}", markup=False, highlight=False)
            measured[name] = measure(finished, act_bits=options.bits, certify_at=options.certify, images=options.images)
        return image_sections.sections(first, named, measured, folder)

    return _work(experiments, named, folder, sections)


def _name(run: Path, variant: str, options: Report) -> str:
    return variant if len(options.runs) == 1 else f"{run.resolve().name}/{variant}"


def _work(experiments: dict[Path, Experiment | GraphExperiment], results: dict[str, Any], folder: Path, sections):
    def work(console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        alike: dict[str, list[str]] = {}  # names of runs, by what was trained on what
        for run, experiment in experiments.items():
            alike.setdefault(f"{experiment.model.name} on {experiment.data.name}", []).append(run.resolve().name)
        title = "; ".join(f"{', '.join(names)}: {what}" for what, names in alike.items())
        lead = (
            f"<p>{'; '.join(alike)}: {', '.join(results)}. How accurate each network is, and how faithfully it follows "
            "its own high-precision twin.</p>"
        )
        names = [run.resolve().name for run in experiments]
        footer = f"Made by python -m train report from the run{'s' if len(names) > 1 else ''} {', '.join(names)}."
        document = page(title, lead, sections(console), footer)
        (folder / PAGE).write_text(document, encoding="utf-8")
        console.print(f"written to {folder / PAGE}", markup=False, highlight=False, soft_wrap=True)

    return work
