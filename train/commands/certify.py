"""How many predictions of a finished run its rounding provably does not change: `qpde.certify` over test images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from train.config.images import check_at_least
from train.host.console import print_table
from train.trained.certificates import measure
from train.trained.finished import read_finished

_COLUMNS = ("bits", "variant", "accuracy", "agreement", "certified", "a priori", "bound/error")


@dataclasses.dataclass(frozen=True)
class Certify:
    """Count the test images that a network provably classifies as its high-precision twin does.

    The twin has the same weights and batch statistics; its activations are clipped, and not rounded. The table's column
    "a priori" counts the images for which the clips and bits alone are proof enough. "bound/error" says how tight the
    proof is: the proven bound of a logit difference's error, divided by the error itself, as the median over images
    and classes.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run on images."""
    bits: tuple[int, ...] = (8, 6, 4)
    """Bits of the activations."""
    images: int = 1000
    """Number of test images, the first ones."""
    newton_steps: int = 2
    """Steps of Newton's method before the proof, see `qpde.certify`. More steps certify more images. With 0 every
    rounding error counts at its worst."""
    data_dir: Path | None = None
    """Root folder of the data. Default: the environment variable QPDE_DATA_DIR."""


def prepare_certify(options: Certify) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run on images, its activations are not quantized, or an option
        is out of range.
    """
    check_at_least("images", options.images, 1)
    check_at_least("newton_steps", options.newton_steps, 0)
    outside = [bits for bits in options.bits if not 2 <= bits <= 15]
    if outside or not options.bits:
        raise ValueError(f"--bits (={outside or ()}) must round: give some of 2 to 15")
    found = read_finished(options.run, options.data_dir)
    for name, finished in found.items():
        if finished.model.act_bits is None:
            raise ValueError(f"{name} of {options.run} rounds no activations: `quantize` the run first")
        finished.check_levels(options.bits)

    def work(console: Console) -> None:
        # Seven columns in the 80 of a plain terminal.
        title = f"{options.run.name}: {options.images} test images, newton_steps: {options.newton_steps}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
        for act_bits in options.bits:
            for i, (name, finished) in enumerate(found.items()):
                measured = measure(finished, act_bits, images=options.images, newton_steps=options.newton_steps)
                shares = (f"{measured[key]:.1%}" for key in ("accuracy", "agreement", "certified", "a_priori"))
                table.add_row("" if i else str(act_bits), name, *shares, f"{measured['tightness']:.3g}")
        print_table(console, table)

    return work
