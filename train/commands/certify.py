"""How many predictions of a finished run its rounding provably does not change: `qpde.certify` over test images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from qpde.models.images.segmentation import SegmentationNetwork
from train.config.images import check_at_least
from train.host.console import print_table
from train.trained.certificates import PartBound, measure
from train.trained.finished import read_finished

_COLUMNS = ("bits", "variant", "accuracy", "agreement", "certified", "a priori", "bound/error")


@dataclasses.dataclass(frozen=True)
class Certify:
    """Count the test images that a network provably classifies as its high-precision twin does.

    The twin has the same weights and batch statistics; its activations are clipped, and not rounded. The table's column
    "a priori" counts the images for which the clips and bits alone are proof enough. "bound/error" says how tight the
    proof is: the proven bound of a logit difference's error, divided by the error itself, as the median over images
    and classes.

    A segmentation run is certified pixel by pixel. With Newton steps a second table then says where the bounds come
    from: the constant of every part, and the share of the bounds that starts at its rounding.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run on images."""
    bits: tuple[int, ...] = (8, 6, 4)
    """Bits of the activations."""
    images: int | None = None
    """Number of test images, the first ones. Default: 1000, or 4 of a segmentation run."""
    newton_steps: int | None = None
    """Steps of Newton's method before the proof, see `qpde.certify`. Default: none, and every prediction that is the
    twin's is proven by the twin itself, for the least. With a number the proof rests on the constants of the network's
    steps: it says why predictions stay, and how stable the network is. With 0 every rounding error counts at its
    worst."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""


def prepare_certify(options: Certify) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run on images, its activations are not quantized, or an option
        is out of range.
    """
    if options.images is not None:
        check_at_least("images", options.images, 1)
    if options.newton_steps is not None:
        check_at_least("newton_steps", options.newton_steps, 0)
    outside = [bits for bits in options.bits if not 2 <= bits <= 15]
    if outside or not options.bits:
        raise ValueError(f"--bits (={outside or ()}) must round: give some of 2 to 15")
    found = read_finished(options.run, options.data_dir)
    for name, finished in found.items():
        if finished.model.act_bits is None:
            raise ValueError(f"{name} of {options.run} rounds no activations: `quantize` the run first")
        finished.check_levels(options.bits)

    of_pixels = any(isinstance(finished.model, SegmentationNetwork) for finished in found.values())
    images = options.images or (4 if of_pixels else 1000)

    def work(console: Console) -> None:
        # Seven columns in the 80 of a plain terminal.
        what = "pixels of " if of_pixels else ""
        candidate = "the twin itself" if options.newton_steps is None else f"newton_steps: {options.newton_steps}"
        title = f"{options.run.name}: {what}{images} test images, {candidate}"
        parts: dict[tuple[str, int], list[PartBound]] = {}
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
        for act_bits in options.bits:
            for i, (name, finished) in enumerate(found.items()):
                measured = measure(finished, act_bits, images=images, newton_steps=options.newton_steps)
                shares = (f"{measured[key]:.1%}" for key in ("accuracy", "agreement", "certified", "a_priori"))
                table.add_row("" if i else str(act_bits), name, *shares, f"{measured['tightness']:.3g}")
                parts[name, act_bits] = measured.get("parts", [])
        print_table(console, table)
        for name in found if of_pixels and options.newton_steps is not None else ():
            print_table(console, _parts_table(name, {bits: parts[name, bits] for bits in options.bits}))

    return work


def _parts_table(name: str, by_bits: dict[int, list[PartBound]]) -> Table:
    table = Table(title=f"{name}: where the bounds of pixels come from", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(("part", "constant", *(f"share at {bits} bits" for bits in by_bits))):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for rows in zip(*by_bits.values(), strict=True):
        largest = max(row.lipschitz for row in rows)
        table.add_row(rows[0].name, f"{largest:.3g}", *(f"{row.share:.1%}" for row in rows))
    return table
