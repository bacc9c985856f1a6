"""Finished runs side by side: accuracy against layer-wise error, in one table and one picture."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_type_hints

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

    The table is written beside the picture as JSON. Given again, it stands for the runs in it, wherever they are.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs on images, and tables of this command (.json)."""
    output: Path = Path("frontier.png")
    """The picture, its format by its ending: .png, .svg or .pdf. The table has its name and the ending .json."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A network, the epochs that it was trained for, and its parameters."""

    run: str
    variant: str
    parameters: int
    epochs: int
    share: float
    agreement: float
    error: float
    relative_error: float
    is_rounded: bool

    def __post_init__(self):
        for name, kind in get_type_hints(_Row).items():
            value = getattr(self, name)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"{name} (={value!r}) must be of type {kind.__name__}")
            if kind is float and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} (={value!r}) must be finite and not negative")

    @property
    def point(self) -> NetworkPoint:
        return NetworkPoint(self.variant, self.run, self.share, self.error, self.relative_error, self.is_rounded)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Networks that were tested on the same images by the same share."""

    images: str
    share: str
    rows: tuple[_Row, ...]


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
    tables = {path: _read(path) for path in options.runs}
    first, *others = tables.items()
    for path, table in others:
        if (table.images, table.share) != (first[1].images, first[1].share):
            images = f"{table.images} and {first[1].images}"
            raise ValueError(f"{path} and {first[0]} were tested on {images}: compare runs on the same images")
    share = first[1].share
    # A run that a table holds as well counts once, as it was read last.
    rows = list({(row.run, row.variant): row for table in tables.values() for row in table.rows}.values())
    if not rows:
        raise ValueError("none of these runs has a network that rounds its activations: quantize one first")
    if len({row.variant for row in rows}) > len(COLOURS):
        raise ValueError(f"these runs have more than the {len(COLOURS)} variants that one picture tells apart")

    def work(console: Console) -> None:
        print_table(console, _table(rows, share))
        frontier_figure(
            [row.point for row in rows],
            options.output,
            quantity=_NAMES[share],
            hollow="rounded shortcut",
        )
        stored = dataclasses.asdict(dataclasses.replace(first[1], rows=tuple(rows)))
        beside = options.output.with_suffix(".json")
        beside.write_text(json.dumps(stored, indent=1) + "\n")
        console.print(f"written to {options.output} and {beside}", markup=False, highlight=False, soft_wrap=True)

    return work


def _read(path: Path) -> _Table:
    """The networks of a run, or of a table that this command wrote."""
    if path.suffix == ".json" and path.is_file():
        try:
            stored = json.loads(path.read_text())
            table = _Table(**stored | {"rows": tuple(_Row(**row) for row in stored["rows"])})
            if table.share not in _NAMES:
                raise ValueError(f"share (={table.share!r}) must be one of {', '.join(_NAMES)}")
            return table
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} is no table of this command ({error}): name the folders of its runs") from None
    experiment = read_experiment(path)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path} trained on a graph: its own table compares all its networks")
    share = "mean_iou" if isinstance(experiment, SegmentationExperiment) else "accuracy"
    variants = {variant.name: variant for variant in experiment.chosen}
    rows = tuple(
        _Row(
            run=path.name,
            variant=name,
            parameters=result["parameters"],
            epochs=experiment.epochs,
            share=result[share],
            agreement=result["agreement"],
            error=result["mean_layer_error"],
            relative_error=result["mean_relative_layer_error"],
            is_rounded=experiment.model_of(variants[name]).residual == "rounded",
        )
        for name, result in read_results(path).items()
        if "mean_layer_error" in result
    )
    return _Table(experiment.data.name, share, rows)


def _table(rows: list[_Row], share: str) -> Table:
    table = Table(title="accuracy and layer-wise error, test images", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("run", "variant", "parameters", "epochs", _NAMES[share], "agreement", "error", "relative", "best"):
        table.add_column(column, justify="left" if column in ("run", "variant", "best") else "right")
    shares = [row.share for row in rows]
    best = {
        "a": frontier(shares, [row.error for row in rows]),
        "r": frontier(shares, [row.relative_error for row in rows]),
    }
    for i, row in enumerate(rows):
        table.add_row(
            row.run,
            row.variant,
            f"{row.parameters:,}",
            str(row.epochs),
            f"{row.share:.2%}",
            f"{row.agreement:.2%}",
            f"{row.error:.4f}",
            f"{row.relative_error:.4f}",
            " ".join(name for name, places in best.items() if i in places),
        )
    return table
