"""`python -m train report`: the page of one run or of several."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from train.config.graphs import GraphExperiment
from train.config.images import Experiment, check_at_least
from train.config.segmentation import SegmentationExperiment
from train.host.provenance import provenance
from train.page import graph_sections, image_sections, map_sections
from train.page.html import fill, page
from train.page.provenance import read_about
from train.runs.directory import read_experiment, read_lines, read_results
from train.tasks.images_summary import check_drawable
from train.tasks.nodes_summary import FULL
from train.trained.figures import measure
from train.trained.finished import read_finished
from train.trained.scenes import measure_scenes

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Report:
    """Show finished runs on one page: their results, and what is measured now.

    Writes RUN/report/report.html, for the first run. The file holds its figures and opens without a network connection.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs: one or several on images, or one on a graph."""
    bits: tuple[int, ...] = (2, 4, 6, 8)
    """Bits of the activations at which accuracy and agreement are measured."""
    certify: tuple[int, ...] = (8, 6, 4)
    """Bits of the activations at which predictions are certified."""
    images: int = 500
    """Number of test images to measure on, the first ones."""
    certify_images: int = 64
    """Number of test images to certify, the first ones. One takes as long as a hundred predictions."""
    smoothing: bool = False
    """Also show what smoothing would do to the feature maps of networks that do not smooth."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""
    output: Path | None = None
    """Folder to write the page to, instead of RUN/report."""


def prepare_report(options: Report) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: no finished runs are there, they do not fit on one page, or an option is out of range.
    """
    check_at_least("images", options.images, 1)
    check_at_least("certify_images", options.certify_images, 1)
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
    of_maps = [run for run, experiment in experiments.items() if isinstance(experiment, SegmentationExperiment)]
    if of_maps and len(of_maps) < len(experiments):
        raise ValueError(f"{of_maps[0]} has a class for every pixel, other runs one for an image: give each its page")
    results = {run: read_results(run) for run in options.runs}
    folder = options.output or options.runs[0] / "report"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: choose another --output")
    first = experiments[options.runs[0]]
    if isinstance(first, GraphExperiment):
        ((run, of_graph),) = results.items()
        lines = _by_variant(run)
        about = {name: read_about(run / name / FULL) for name in of_graph}
        return _work(experiments, of_graph, folder, lambda _: graph_sections.sections(first, of_graph, lines, about))

    named = {_name(run, variant, options): r for run, variants in results.items() for variant, r in variants.items()}
    check_drawable(named)
    lines = {_name(run, variant, options): own for run in options.runs for variant, own in _by_variant(run).items()}
    found = {
        _name(run, variant, options): finished
        for run in options.runs
        for variant, finished in read_finished(run, options.data_dir).items()
    }
    for finished in found.values():
        if finished.model.act_bits is not None:
            finished.check_levels(options.bits + options.certify)

    def sections(console: Console) -> list[tuple[str, str]]:
        measured: dict[str, Any] = {}
        if isinstance(first, SegmentationExperiment):
            for name, finished in found.items():
                console.print(f"measuring {name}", markup=False, highlight=False)
                measured[name] = measure_scenes(
                    finished, act_bits=options.bits, certify_at=options.certify, images=options.images
                )
            return map_sections.sections(first, named, measured, lines)
        for name, finished in found.items():
            console.print(f"measuring {name}", markup=False, highlight=False)
            measured[name] = measure(
                finished,
                act_bits=options.bits,
                certify_at=options.certify,
                images=options.images,
                certify_images=options.certify_images,
                smoothing=options.smoothing,
            )
        return image_sections.sections(first, named, measured, lines)

    return _work(experiments, named, folder, sections)


def _by_variant(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl of each variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(run):
        found.setdefault(line["variant"], []).append(line)
    return found


def _name(run: Path, variant: str, options: Report) -> str:
    return variant if len(options.runs) == 1 else f"{run.resolve().name}/{variant}"


def _work(experiments: dict[Path, Experiment | GraphExperiment], results: dict[str, Any], folder: Path, sections):
    def work(console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        alike: dict[str, list[str]] = {}  # names of runs, by what was trained on what
        for run, experiment in experiments.items():
            alike.setdefault(f"{experiment.model.name} on {experiment.data.name}", []).append(run.resolve().name)
        title = "; ".join(f"{', '.join(names)}: {what}" for what, names in alike.items())
        lead = fill(
            "<p>{what}: {networks}. How accurate each network is, and how faithfully it follows its own "
            "high-precision twin.</p>",
            what="; ".join(alike),
            networks=", ".join(results),
        )
        names = [run.resolve().name for run in experiments]
        now = provenance()
        commit = f", commit {now['commit'][:12]}" if now["commit"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in now["versions"].items())
        footer = (
            f"Made by python -m train report from the run{'s' if len(names) > 1 else ''} {', '.join(names)} on "
            f"{now['date'][:10]}, {versions}{commit}."
        )
        document = page(title, lead, sections(console), footer)
        (folder / PAGE).write_text(document, encoding="utf-8")
        console.print(f"written to {folder / PAGE}", markup=False, highlight=False, soft_wrap=True)

    return work
