"""Finished runs side by side: accuracy against layer-wise error, in one table and one picture."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from qpde.plots import COLOURS, NetworkPoint, frontier, frontier_figure
from train.config.images import Experiment
from train.config.segmentation import SegmentationExperiment
from train.host.console import print_table
from train.runs.directory import read_experiment, read_results

_NAMES = {"accuracy": "accuracy", "mean_iou": "mean IoU"}


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Compare the quantized networks of finished runs by their accuracy and their layer-wise error.

    "best" marks the networks that no other one of the table beats in both, with the absolute error ("a") or with the
    relative one ("r"): a line joins them in the picture. Hollow points are networks whose shortcut is rounded. Nothing
    is measured again. Segmentation networks are compared by their mean intersection over union.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs on images."""
    output: Path = Path("frontier.png")
    """The picture, its format by its ending: .png, .svg or .pdf."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A network, the epochs that it was trained for, and its parameters."""

    run: str
    point: NetworkPoint
    agreement: float
    epochs: int
    parameters: int


def prepare_frontier(options: Frontier) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: A folder holds no finished run on images, the runs were tested on other images, nothing is
        quantized, or the picture has no place.
    """
    if not options.runs:
        raise ValueError("name the folders of finished runs: frontier runs/a runs/b")
    if options.output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output (={options.output}) must end with .png, .svg or .pdf")
    if not options.output.parent.is_dir():
        raise ValueError(f"--output (={options.output}) lies in no folder: {options.output.parent} does not exist")
    experiments: dict[Path, Experiment] = {}
    for run in options.runs:
        experiment = read_experiment(run)
        if not isinstance(experiment, Experiment):
            raise ValueError(f"{run} trained on a graph: its own table compares all its networks")
        experiments[run] = experiment
    first, *others = experiments.items()
    for run, experiment in others:
        if experiment.data.name != first[1].data.name:
            images = f"{experiment.data.name} and {first[1].data.name}"
            raise ValueError(f"{run} and {first[0]} were tested on {images}: compare runs on the same images")
    share = "mean_iou" if isinstance(first[1], SegmentationExperiment) else "accuracy"
    rows = [row for run, experiment in experiments.items() for row in _rows(run, experiment, share)]
    if not rows:
        raise ValueError("none of these runs has a network that rounds its activations: quantize one first")
    if len({row.point.kind for row in rows}) > len(COLOURS):
        raise ValueError(f"these runs have more than the {len(COLOURS)} variants that one picture tells apart")

    def work(console: Console) -> None:
        print_table(console, _table(rows, share))
        frontier_figure(
            [row.point for row in rows],
            options.output,
            quantity=_NAMES[share],
            hollow="rounded shortcut",
        )
        console.print(f"written to {options.output}", markup=False, highlight=False, soft_wrap=True)

    return work


def _rows(run: Path, experiment: Experiment, share: str) -> list[_Row]:
    variants = {variant.name: variant for variant in experiment.chosen}
    found = []
    for name, result in read_results(run).items():
        if "mean_layer_error" not in result:
            continue
        errors = result["mean_layer_error"], result["mean_relative_layer_error"]
        is_rounded = experiment.model_of(variants[name]).residual == "rounded"
        point = NetworkPoint(name, experiment.name, result[share], *errors, is_rounded)
        found.append(_Row(run.name, point, result["agreement"], experiment.epochs, result["parameters"]))
    return found


def _table(rows: list[_Row], share: str) -> Table:
    table = Table(title="accuracy and layer-wise error, test images", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("run", "variant", "parameters", "epochs", _NAMES[share], "agreement", "error", "relative", "best"):
        table.add_column(column, justify="left" if column in ("run", "variant", "best") else "right")
    accuracies = [row.point.accuracy for row in rows]
    best = {
        "a": frontier(accuracies, [row.point.error for row in rows]),
        "r": frontier(accuracies, [row.point.relative_error for row in rows]),
    }
    for i, row in enumerate(rows):
        point = row.point
        table.add_row(
            row.run,
            point.kind,
            f"{row.parameters:,}",
            str(row.epochs),
            f"{point.accuracy:.2%}",
            f"{row.agreement:.2%}",
            f"{point.error:.4f}",
            f"{point.relative_error:.4f}",
            " ".join(name for name, places in best.items() if i in places),
        )
    return table
