"""Histograms of magnitudes that can be merged, and the clips that they give: a stream of data in constant memory."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from qpde import quantizers
from qpde.devices import by_compiler

__all__ = ["BINS", "Histogram", "clip_from", "histogram", "merge"]

BINS = 4096


class Histogram(NamedTuple):
    """Magnitudes of a tensor, or of many, in bins of equal width from 0 to the power of two above the largest.

    Attributes:
      counts: (1 + bins,) of the zeros, then of every bin (k - 1) width < a <= k width.
      largest: scalar, the largest magnitude.
    """

    counts: Float[Array, " bins"]
    largest: Float[Array, ""]


def histogram(x: Num[Array | np.ndarray, "..."], *, signed: bool, bins: int = BINS) -> Histogram:
    """The histogram of |x| for signed data, of max(x, 0) otherwise.

    The width follows from the largest value alone, as a power of two, so bins of one histogram are unions of bins of
    another, and `merge` of parts is exactly the histogram of the whole.

    Args:
      x: floating point, any shape.   signed: of its quantizer.   bins: a power of two.
    Returns:
      `Histogram`, float32; a NaN makes `largest` NaN.
    """

    def counted(x):
        a = jnp.abs(x) if signed else jnp.maximum(x, 0)
        a = a.ravel().astype(jnp.float32)
        largest = a.max()
        index = jnp.clip(jnp.ceil(a * (bins / _limit(largest))).astype(jnp.int32), 0, bins)
        # Counted as integers: float32 would stop at 2^24 equal values.
        return Histogram(jnp.zeros(1 + bins, jnp.int32).at[index].add(1).astype(jnp.float32), largest)

    return by_compiler(counted)(jnp.asarray(x))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both data together; associative and commutative, up to float32 sums beyond 2^24."""
    largest = jnp.maximum(a.largest, b.largest)
    index = jnp.arange(len(a.counts), dtype=jnp.float32)

    def rebinned(h):
        wider = jnp.ceil(index * (_limit(h.largest) / _limit(largest))).astype(jnp.int32)
        return jnp.zeros_like(h.counts).at[wider].add(h.counts)

    return Histogram(rebinned(a) + rebinned(b), largest)


def clip_from(
    histogram: Histogram, bits: ArrayLike | None, *, signed: bool, method: str = "mse", levels: str = "uniform"
) -> Float[Array, ""]:
    """`qpde.quantizers.initial_clip` of the data in a histogram, each value taken for the middle of its bin."""
    index = jnp.arange(len(histogram.counts), dtype=jnp.float32)
    width = _limit(histogram.largest) / (len(histogram.counts) - 1)
    middle = jnp.maximum(index - 0.5, 0) * width
    values = jnp.where(index * width >= histogram.largest, histogram.largest, middle)
    options = {"signed": signed, "method": method, "levels": levels}
    return quantizers.initial_clip(values, bits, counts=histogram.counts, **options)


def _limit(largest: Array) -> Array:
    """The power of two above, or 1 for 0."""
    return jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1])
