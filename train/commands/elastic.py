"""The networks of a finished run at other bits than their own: one table of accuracy and agreement against bits."""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from qpde.bits import Bits, distinct_bits
from qpde.measure.bit_widths import BitsComparison, compare_bits
from qpde.plots import against_bits_figure
from train.host.console import print_table
from train.trained.finished import Finished, read_finished

_FULL = Bits(32, 32)

# Columns of the table and panels of the picture: heading, field of a row. The first one is of maps alone.
_COLUMNS = (
    ("mean IoU, %", "mean_iou"),
    ("accuracy, %", "accuracy"),
    ("agreement, twin, %", "agreement"),
    ("agreement, 32 bits, %", "agreement_full"),
)


@dataclasses.dataclass(frozen=True)
class ElasticRun:
    """Evaluate the networks of a finished run at several bits, with one set of weights and clips.

    Batch statistics are estimated again at each number of bits. The network is compared with two others: with its
    high-precision twin, which has the same rounded weights, and with W32A32, which rounds nothing. Networks trained
    with bits drawn at random (a recipe such as any_bit) are made for this. Writes RUN/elastic.csv and RUN/elastic.png.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run on images."""
    bits: tuple[str, ...] = ("2", "3", "4", "6", "8", "32")
    """Bits: W4A8 is 4-bit weights and 8-bit activations, 4 is both."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""


def prepare_elastic(options: ElasticRun) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run on images, one that is not quantized, or an option is wrong.
    """
    if not options.bits:
        raise ValueError("--bits is empty: give some, such as --bits 2 3 4 6 8 32")
    at = {f"W{bits.weights}A{bits.activations}": bits for bits in distinct_bits(options.bits)}
    found = read_finished(options.run, options.data_dir)
    for finished in found.values():
        check_quantized(finished, options.run, list(at.values()))

    def work(console: Console) -> None:
        results = {name: _measure(finished, at) for name, finished in found.items()}
        print_table(console, _table(options.run.name, results))
        first = next(iter(next(iter(results.values())).values()))
        with open(options.run / "elastic.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("bits", "variant", *first))
            for name, rows in results.items():
                writer.writerows((text, name, *row.values()) for text, row in rows.items())
        panels = {
            heading: {
                name: {text: (100 * row[field], float("nan")) for text, row in rows.items()}
                for name, rows in results.items()
            }
            for heading, field in _columns_of(first)
        }
        against_bits_figure(panels, options.run / "elastic.png", title=options.run.name)
        console.print(f"written to {options.run}", markup=False, highlight=False, soft_wrap=True)

    return work


def check_quantized(finished: Finished, run: Path, at: Sequence[Bits]) -> None:
    """ValueError for a network without quantizers, or whose level set has none of these bits."""
    if None in finished.model.bits:
        raise ValueError(
            f"{finished.name} of {run} has no quantizers of weights or of activations: `quantize` the run first"
        )
    finished.check_levels(part for bits in at for part in bits)


def compare_at(finished: Finished, at: Sequence[Bits], references: Sequence[Bits]) -> BitsComparison:
    """`compare_bits` on the test images, with batch statistics from training images."""
    return compare_bits(
        finished.model,
        finished.variables,
        finished.test_images(),
        at,
        references=references,
        statistics_batches=finished.statistics_batches(),
    )


def _measure(finished: Finished, at: dict[str, Bits]) -> dict[str, dict[str, float]]:
    """What is measured, by bits."""
    rows, count = list(at.values()), len(at)
    found = compare_at(finished, rows * 2, [bits.twin for bits in rows] + [_FULL] * count)
    by_field = {
        "accuracy": found.accuracy,
        "accuracy_twin": found.accuracy_reference,
        "agreement": found.agreement,
        "agreement_full": found.agreement[count:],
        "kl": found.kl,
        "kl_full": found.kl[count:],
    }
    if found.iou is not None:
        by_field |= {"mean_iou": found.mean_iou, "mean_iou_twin": found.mean_iou_reference}
    return {text: {field: float(np.asarray(v)[i]) for field, v in by_field.items()} for i, text in enumerate(at)}


def _columns_of(row: dict[str, float]) -> list[tuple[str, str]]:
    return [(heading, field) for heading, field in _COLUMNS if field in row]


def _table(name: str, results: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title=f"{name}: one set of weights at several bits, test images", box=box.SIMPLE_HEAD)
    first = next(iter(results.values()))
    columns = _columns_of(next(iter(first.values())))
    for heading in ("bits", "variant", *(heading for heading, _ in columns)):
        table.add_column(heading, justify="left" if heading in ("bits", "variant") else "right")
    for text in first:
        for i, (variant, rows) in enumerate(results.items()):
            cells = (f"{100 * rows[text][field]:.2f}" for _, field in columns)
            table.add_row("" if i else text, variant, *cells)
    return table
