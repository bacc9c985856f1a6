"""Histograms of magnitudes that can be merged, and the clips that they give: a stream of data in constant memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from qpde import quantizers
from qpde.devices import by_compiler

__all__ = ["BINS", "OCTAVES", "Histogram", "clip_from", "edges", "histogram", "merge"]

OCTAVES = 32
"""Powers of two below the largest value that are told apart; what is smaller counts in the first bin."""
BINS = 512 * OCTAVES
"""A bin is 1/512 of the power of two below it, so at most 0.2% of its values."""


class Histogram(NamedTuple):
    """Magnitudes of a tensor, or of many, in bins of bounded relative width.

    The floats of an octave, from a power of two to the next, fall into equally many bins. The last octave is that of
    the largest value. So one far outlier does not blur the others: a percentile is known to the width of a bin.

    Attributes:
      counts: (1 + bins,) of the zeros, then of every bin low <= a < high, see `edges`.
      largest: scalar, the largest magnitude.
    """

    counts: Float[Array, " bins"]
    largest: Float[Array, ""]


def histogram(x: Num[Array | np.ndarray, "..."], *, signed: bool, bins: int = BINS) -> Histogram:
    """The histogram of |x| for signed data, of max(x, 0) otherwise.

    The bins follow from the octave of the largest value alone, so bins of one histogram are unions of bins of another,
    and `merge` of parts is exactly the histogram of the whole.

    Args:
      x: floating point, any shape; of no numbers at all, all counts are 0.
      signed: Whether its quantizer is signed.
      bins: `OCTAVES` times a power of two.
    Returns:
      `Histogram`, float32; a NaN makes `largest` NaN.
    """

    def counted(x):
        a = jnp.abs(x) if signed else jnp.maximum(x, 0)
        a = a.ravel().astype(jnp.float32)
        largest = jnp.max(a, initial=0)
        # The bits of a float, without the last ones of the mantissa, number the bins of all octaves.
        number = jax.lax.bitcast_convert_type(a, jnp.int32) >> _dropped(bins)
        index = jnp.where(a > 0, jnp.clip(number - _first(largest, bins), 1, bins), 0)
        # Counted as integers: float32 would stop at 2^24 equal values.
        return Histogram(jnp.zeros(1 + bins, jnp.int32).at[index].add(1).astype(jnp.float32), largest)

    return by_compiler(counted)(jnp.asarray(x))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both data together; associative and commutative, up to float32 sums beyond 2^24.

    Args:
      a: Histogram of some data.
      b: Histogram of other data, with equally many bins.
    """
    largest = jnp.maximum(a.largest, b.largest)
    bins = len(a.counts) - 1
    index = jnp.arange(1, 1 + bins)

    def rebinned(h):
        moved = jnp.maximum(index + (_first(h.largest, bins) - _first(largest, bins)), 1)
        return jnp.zeros_like(h.counts).at[0].set(h.counts[0]).at[moved].add(h.counts[1:])

    return Histogram(rebinned(a) + rebinned(b), largest)


def clip_from(
    histogram: Histogram, bits: ArrayLike | None, *, signed: bool, method: str = "mse", levels: str = "uniform"
) -> Float[Array, ""]:
    """`qpde.quantizers.initial_clip` of the data in a histogram, each value taken for the middle of its bin.

    Args:
      histogram: Histogram of the data.
      bits: Bits of the quantizer, or None where it does not round.
      signed: Whether the quantizer is signed, as the histogram is.
      method: How the clip is found, as for `initial_clip`.
      levels: Levels of the quantizer.
    """
    ends = edges(histogram)
    middles = jnp.concatenate([jnp.zeros(1), ends[:-1] + (ends[1:] - ends[:-1]) / 2])
    of_largest = jnp.concatenate(
        [jnp.zeros(1, bool), (ends[:-1] <= histogram.largest) & (histogram.largest < ends[1:])]
    )
    values = jnp.where(of_largest | ~jnp.isfinite(histogram.largest), histogram.largest, middles)
    options: dict[str, Any] = {"signed": signed, "method": method, "levels": levels}
    return quantizers.initial_clip(values, bits, counts=histogram.counts, **options)


def edges(histogram: Histogram) -> Float[Array, " edges"]:
    """Edges (bins + 1,) of the bins of positive values, ascending: 0, then powers of two and what divides octaves."""
    bins = len(histogram.counts) - 1
    number = _first(histogram.largest, bins) + jnp.arange(1, bins + 2)
    ends = jax.lax.bitcast_convert_type(jnp.maximum(number, 0) << _dropped(bins), jnp.float32)
    finite = jnp.minimum(ends, jnp.finfo(jnp.float32).max)
    return jnp.where(jnp.arange(bins + 1) == 0, 0.0, finite)


def _dropped(bins: int) -> int:
    """Bits of the mantissa in a bin."""
    per_octave = bins // OCTAVES
    if bins % OCTAVES or per_octave & (per_octave - 1) or not 1 <= per_octave <= 2**23:
        raise ValueError(f"`bins` (={bins}) must be {OCTAVES} times a power of two")
    return 23 - (per_octave.bit_length() - 1)


def _first(largest: Array | np.ndarray | np.floating, bins: int) -> Array:
    """Number of the bin before the first one: the last one ends with the octave of the largest value, or of 1 for 0."""
    largest = jnp.where(largest == 0, jnp.ones_like(largest), largest)
    octave = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    return (octave + 1 - OCTAVES) * (bins // OCTAVES) - 1
