"""How many predictions of a finished run its rounding provably does not change: `qpde.certificate` over test images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from qpde.bits import Bits
from qpde.certificate import certify, exact_twin, step_bounds
from qpde.models import converge_norms
from train.config import check_at_least
from train.finished import Finished, read_finished
from train.progress import print_table

_COLUMNS = ("bits", "variant", "accuracy", "agreement", "certified", "a priori", "bound/error")


@dataclasses.dataclass(frozen=True)
class Certify:
    """Certify predictions of a finished run: test images that it provably classifies as its high-precision twin does.

    The twin has the network's own weights and batch statistics, its activations clipped and not rounded. "bound/error"
    is the median over images and classes of the proven bound of a logit difference's error over that error.
    "a priori" counts the images for which clips and widths alone are enough.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    bits: tuple[int, ...] = (8, 6, 4)
    """Widths of activations."""
    images: int = 1000
    """Test images, from the first on."""
    sweeps: int = 2
    """Of Newton's method before the proof, see `qpde.certificate`: 0 for the worst case of the injected errors."""
    data_dir: Path | None = None
    """Root of the data. Without it the environment variable QPDE_DATA_DIR counts."""


def prepare_certify(options: Certify) -> Callable[[Console], None]:
    """The job, everything about it checked.

    Raises:
      ValueError, OSError: the folder holds no finished run on images, its activations are not quantized, or an option
        is out of range.
    """
    check_at_least("images", options.images, 1)
    check_at_least("sweeps", options.sweeps, 0)
    if outside := [bits for bits in options.bits if not 2 <= bits <= 15] or not options.bits:
        raise ValueError(f"--bits (={outside or ()}) are widths that round: give some of 2 to 15")
    found = read_finished(options.run, options.data_dir)
    for name, finished in found.items():
        if finished.training.model.act_bits is None:
            raise ValueError(f"{name} of {options.run} rounds no activations: `quantize` the run first")
        finished.check_levels(options.bits)

    def work(console: Console) -> None:
        # Seven columns in the 80 of a plain terminal.
        title = f"{options.run.name}: {options.images} test images, sweeps: {options.sweeps}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
        for width in options.bits:
            for i, (name, finished) in enumerate(found.items()):
                measured = measure(finished, width, images=options.images, sweeps=options.sweeps)
                shares = (f"{measured[key]:.1%}" for key in ("accuracy", "agreement", "certified", "a_priori"))
                table.add_row("" if i else str(width), name, *shares, f"{measured['tightness']:.3g}")
        print_table(console, table)

    return work


def measure(finished: Finished, width: int, *, images: int, sweeps: int = 2) -> dict[str, float]:
    """Shares of the first test images, and the median of bound over measured difference.

    Args:
      finished: a trained network.   width: of its activations.   images: how many.   sweeps: of `certify`.
    Returns:
      "accuracy", "agreement", "certified", "a_priori" and "tightness".
    """
    whole = measure_images(finished, width, images=images, sweeps=sweeps)
    ratio = tightness(whole.pop("bound"), whole.pop("error"))
    return {key: float(values.mean()) for key, values in whole.items()} | {"tightness": ratio}


def tightness(bound: np.ndarray, error: np.ndarray) -> float:
    """The median of bounds over the errors that they bound, of those that are not 0; NaN where all are."""
    found = error > 0
    return float(np.median(bound[found] / error[found])) if found.any() else float("nan")


def measure_images(finished: Finished, width: int, *, images: int, sweeps: int = 2) -> dict[str, np.ndarray]:
    """What `measure` sums up: "accuracy", "agreement", "certified" and "a_priori" for each of the images, "error" and
    "bound" of every logit difference from the predicted class.
    """
    model = finished.training.model
    bits = Bits(None if model.weight_bits is None else jnp.int32(model.weight_bits), jnp.int32(width))
    variables = finished.at(bits)
    if model.clip_widths is not None:  # else the network stays as it is, for one compiled program at all widths
        model, variables = model.at_width(variables, Bits(model.weight_bits, width))
    parts: list[dict[str, Any]] = []
    for x, labels in finished.test_images(images):
        if not parts:
            variables = converge_norms(model, variables, x, bits=bits)
            steps = step_bounds(model, variables, x.shape[1:3], bits)
        found = certify(model, variables, x, bits, sweeps=sweeps, steps=steps)
        twin = exact_twin(model, variables, x, bits)
        chosen, difference = found.prediction[:, None], found.logits - twin
        error = np.abs(np.take_along_axis(difference, chosen, axis=1) - difference)
        others = np.arange(twin.shape[1])[None] != chosen
        parts.append(
            {
                "accuracy": found.prediction == labels,
                "agreement": found.prediction == twin.argmax(-1),
                "certified": found.certified,
                "a_priori": found.certified_a_priori,
                "error": error[others],
                "bound": found.bound[others],
            }
        )
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}
