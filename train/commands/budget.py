"""Bits for each block of a finished run's networks, within the cost of uniform ones: `qpde.ptq.allocate`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import qpde.models
from qpde.bits import Bits, distinct_bits
from qpde.models.images.segmentation import SegmentationNetwork
from qpde.ptq.bit_allocation import FULL, allocate, block_bits, block_costs, sensitivity
from train.commands.elastic import check_quantized, compare_at
from train.config.images import check_at_least
from train.tasks.nodes_summary import name_of
from train.trained.finished import Finished, read_finished


@dataclasses.dataclass(frozen=True)
class Budget:
    """Choose bits for each block of a finished run's networks, and compare them with the same bits everywhere.

    Each of the uniform bits --at sets a budget of bit-operations. Within it, every block gets the bits of --bits that
    change the network's outputs least. That change is measured on training images without labels, by rounding the
    weights or the activations of one block at a time. The table is measured on test images: its agreement and KL
    compare with the network at 32 bits. A segmentation network has its mean IoU there in place of the accuracy. Batch
    statistics are estimated again for each row.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run on images."""
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Bits that the weights and the activations of a block may get."""
    at: tuple[str, ...] = ("3", "4")
    """Uniform bits whose costs are the budgets. W4A8 is 4-bit weights and 8-bit activations, 4 is both."""
    images: int = 512
    """Number of training images to measure the blocks on."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""


def prepare_budget(options: Budget) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run on images, one that is not quantized, a budget is below
        what the cheapest bits cost, or an option is wrong.
    """
    check_at_least("images", options.images, 1)
    if not options.bits or not options.at:
        raise ValueError("--bits and --at must not be empty: give some, such as --bits 2 3 4 6 8 --at 3 4")
    if outside := [bits for bits in options.bits if not 2 <= bits <= 32]:
        raise ValueError(f"--bits (={outside[0]}) must lie in 2 to 32")
    choices = [Bits(weights, activations) for weights in options.bits for activations in options.bits]
    uniform = distinct_bits(options.at)
    found = read_finished(options.run, options.data_dir)
    for finished in found.values():
        check_quantized(finished, options.run, choices + uniform)
        shape, model = finished.images.shape, finished.model
        least = int(block_costs(model, shape, choices).min(axis=0).sum())
        for bits in uniform:
            if (budget := _cost(finished, bits)) < least:
                raise ValueError(f"--at {name_of(bits)} costs {budget:,}, less than the cheapest of --bits, {least:,}")

    def work(console: Console) -> None:
        table = Table(title=f"{options.run.name}: bits of blocks within a budget, test images", box=box.SIMPLE_HEAD)
        of_pixels = isinstance(next(iter(found.values())).model, SegmentationNetwork)
        of_labels = "mean IoU" if of_pixels else "accuracy"
        for column in ("variant", "bits", "10^6 bit-ops", of_labels, "agreement", "KL", "blocks"):
            table.add_column(column, justify="left" if column in ("variant", "bits", "blocks") else "right")
        for name, finished in found.items():
            for i, row in enumerate(_rows(finished, options, choices, uniform)):
                table.add_row("" if i else name, *row)
        console.print(table)

    return work


def _rows(finished: Finished, options: Budget, choices: list[Bits], uniform: list[Bits]) -> list[tuple[str, ...]]:
    """A line of the table for each of the uniform bits, and one for the best allocation that costs no more."""
    model, shape = finished.model, finished.images.shape
    seen = list(finished.training_batches(limit=-(-options.images // finished.experiment.batch_size)))
    alone = [Bits(bits, 32) for bits in options.bits] + [Bits(32, bits) for bits in options.bits]
    measured = sensitivity(model, finished.variables, [x for x, _ in seen], alone, statistics_batches=seen).kl
    of_weights, of_activations = np.split(measured, 2)
    errors = (of_weights[:, None] + of_activations).reshape(len(choices), -1)
    costs = block_costs(model, shape, choices)
    labels, rows = [], []
    for bits in uniform:
        mixed = [choices[c] for c in allocate(errors, costs, _cost(finished, bits))]
        labels += [(name_of(bits), "all alike"), ("mixed", " ".join(f"{w}/{a}" for w, a in mixed))]
        rows += [block_bits([bits] * len(mixed)), block_bits(mixed)]
    found = compare_at(finished, rows, [block_bits([FULL] * len(model.blocks))] * len(rows))
    of_labels = np.asarray(found.accuracy if found.mean_iou is None else found.mean_iou)
    return [
        (
            text,
            f"{qpde.models.summary(model, shape, bits=row).bit_operations / 1e6:,.2f}",
            f"{of_labels[i]:.2%}",
            f"{found.agreement[i]:.2%}",
            f"{found.kl[i]:.4g}",
            blocks,
        )
        for i, ((text, blocks), row) in enumerate(zip(labels, rows, strict=True))
    ]


def _cost(finished: Finished, bits: Bits) -> int:
    """Bit-operations of the blocks at uniform bits."""
    return int(block_costs(finished.model, finished.images.shape, [bits]).sum())
