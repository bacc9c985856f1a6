"""Starts for the clips of quantizers (the quantizer's threshold, alpha in PACT), read off data."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from qpde.bits import EXACT_BITS
from qpde.devices import by_compiler
from qpde.quantizers.rounding import (
    ACTIVATION_CLIP,
    WEIGHT_CLIP,
    Grid,
    bits_of,
    compute_dtype,
    fake_quantize,
    floating,
    resolve,
    steps_of,
    unless_exact,
)

__all__ = ["initial_clip"]


def initial_clip(
    x: Num[Array | np.ndarray, "*shape"],
    bits: ArrayLike | None,
    *,
    signed: bool,
    method: str = "constant",
    per_channel: bool = False,
    percentile: float = 99.9,
    rms_factor: float = 4.0,
    levels: str = "uniform",
    counts: Float[Array | np.ndarray, "*shape"] | None = None,
) -> Float[Array, ""] | Float[Array, " C"]:
    """A start for a learned clip, from data. With a = |x| for signed data and max(x, 0) otherwise:

        "constant"    WEIGHT_CLIP (3) if signed, else ACTIVATION_CLIP (6)
        "absmax"      max a
        "percentile"  the given percentile of a, linearly interpolated
        "rms"         rms_factor * sqrt(mean a^2)
        "mse"         least sum (x - quantized x)^2, over i/64 of max a for i up to 80, and 14 more around the best
        "entropy"     least divergence of the rounded from the exact distribution, over i/128 of r, up to i = 128
        "lsq"         the clip whose step clip / n is 2 mean(a) / sqrt(n) (Esser et al., LSQ, ICLR 2020, section 2.1)

    The squared error as a function of the clip has many local minima, hence a search over a grid rather than descent.
    The entropy rule, the idea of Migacz (8-bit inference with TensorRT, 2017), sorts a into 2048 bins. P is their share
    of the data, what lies beyond the clip counted with its last level; Q is the share of what lies inside, of which
    only the levels are known, each spread evenly over the occupied bins that round to it. It minimises
    sum P log(P / Q). (TensorRT counts the outliers in one bin; where data are few, its chance occupation decides.)
    The bins reach up to r, the least 2^-k max a that a thousandth of the data exceeds at most: up to max a, one far
    outlier would leave all else to one bin.
    Zeros are left out: every clip represents them exactly, and after a ReLU they outweigh all else.

    Every rule but the constant scales with the data, over the whole range of normal floats: the clip of s x is s times
    that of x, no larger than the largest float. Smaller numbers count as zeros.

    Args:
      x: Representative data (..., C): an activation, or the weight as it is rounded, so after `standardize_weight`
        where that is on.
      bits: As in `quantize_weight`; used by "mse", "entropy" and "lsq". From 16 bits on, or None, the first two are
        "absmax".
      signed: True for weights and signed activations.
      method: A name above.
      per_channel: One clip for each channel (last axis) instead of a single one.
      percentile: In (0, 100].
      rms_factor: > 0.
      levels: The set that "mse" and "entropy" round to.
      counts: How often each value occurs, >= 0; None is once. So a histogram of a stream, its bins' values in x, gives
        the clip of the stream.
    Returns:
      The clip, () or (C,), in float32 (float64 for float64 data). It is positive: where the rule gives 0 (all a are 0)
      it is the constant. It is NaN where the data of a rule hold a NaN or an infinity. No gradient flows to x.
    Raises:
      ValueError: An unknown method, no data, a parameter out of range, "lsq" with bits None.
    """
    if method not in _CLIP_RULES:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(_CLIP_RULES)}")
    if method == "lsq" and bits is None:
        raise ValueError("method='lsq' needs a number of bits, got None: choose another method")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} must be above 0 and at most 100")
    if not rms_factor > 0:
        raise ValueError(f"rms_factor={rms_factor} must be positive")
    grid, traced_bits = resolve(levels, EXACT_BITS if bits is None else bits, signed=signed)
    x = floating(x)
    if x.size == 0:
        raise ValueError(f"no data to start a clip from: x has shape {x.shape}")
    if per_channel and x.ndim == 0:
        raise ValueError("per_channel=True needs an axis of channels, but x is a scalar")

    def chosen(x, counts, traced_bits):
        # One column for each group that shares a clip: every rule reduces the first axis.
        columns = x.reshape(-1, x.shape[-1] if per_channel else 1)
        counts = None if counts is None else counts.reshape(columns.shape)
        options = _ClipOptions(grid, traced_bits, percentile, rms_factor, counts)
        constant = _constant_clip(columns, options)
        if method == "constant":
            clip = constant
        else:
            # Powers of two, so nothing is rounded: squares and sums are then floats whatever the scale of the data.
            scale = _power_of_two(columns)
            clip = _CLIP_RULES[method](columns / scale[None], options)
            clip = jnp.minimum(jnp.where(clip <= 0, constant, clip * scale), jnp.finfo(clip.dtype).max)
            present = True if counts is None else counts > 0
            clip = jnp.where(jnp.any(present & ~jnp.isfinite(columns), axis=0), jnp.nan, clip)
        return clip if per_channel else clip[0]

    x = jax.lax.stop_gradient(x.astype(compute_dtype(x)))
    counts = None if counts is None else jnp.asarray(counts, x.dtype)
    return by_compiler(chosen)(x, counts, traced_bits)


# Rules for the start of a clip: columns (n, groups) to one clip for each group.


class _ClipOptions(NamedTuple):
    grid: Grid
    traced_bits: Array | None
    percentile: float
    rms_factor: float
    counts: Array | None

    def magnitude(self, x):
        return jnp.abs(x) if self.grid.signed else jnp.maximum(x, 0.0)


def _power_of_two(x):
    """That above the largest magnitude of each column, where it and its inverse are normal floats; 1 for zeros."""
    limit = -jnp.finfo(x.dtype).minexp
    largest = jnp.max(jnp.abs(x), axis=0)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(jnp.frexp(largest)[1], -limit, limit))


def _constant_clip(x, options):
    return jnp.full(x.shape[1:], WEIGHT_CLIP if options.grid.signed else ACTIVATION_CLIP, x.dtype)


def _largest_clip(x, options):
    a = options.magnitude(x)
    return jnp.max(a if options.counts is None else jnp.where(options.counts > 0, a, 0.0), axis=0)


def _percentile_clip(x, options):
    a = options.magnitude(x)
    if options.counts is None:
        return jnp.percentile(a, options.percentile, axis=0)
    order = jnp.argsort(a, axis=0)
    a, counts = (jnp.take_along_axis(v, order, axis=0) for v in (a, options.counts))
    before = jnp.cumsum(counts, axis=0)
    rank = options.percentile / 100 * (before[-1] - 1)

    def value_at(rank):
        index = jnp.sum(before <= rank[None], axis=0, keepdims=True)
        return jnp.take_along_axis(a, index, axis=0, mode="clip")[0]

    low, high = value_at(jnp.floor(rank)), value_at(jnp.ceil(rank))
    return low + (rank - jnp.floor(rank)) * (high - low)


def _rms_clip(x, options):
    return options.rms_factor * jnp.sqrt(_mean(options.magnitude(x) ** 2, options.counts))


def _mean(values, counts):
    return jnp.mean(values, axis=0) if counts is None else jnp.sum(counts * values, axis=0) / jnp.sum(counts, axis=0)


def _least_squares_clip(x, options):
    return _search_least_squares(options.grid, x, _largest_clip(x, options), options.traced_bits, options.counts)


@partial(jax.jit, static_argnums=0)  # one program for all layers of equal shapes
def _search_least_squares(grid, x, largest, traced_bits, counts):
    def error(fraction):
        squares = (x - fake_quantize(grid, x, fraction * largest, traced_bits, jnp.ones(()))) ** 2
        return jnp.sum(squares if counts is None else counts * squares, axis=0)

    def best(fractions):
        errors = jax.lax.map(error, fractions)
        return jnp.take_along_axis(fractions, jnp.argmin(errors, axis=0)[None], axis=0)

    # Beyond the maximum too: with few levels the largest one may do best a little above all data.
    coarse = jnp.broadcast_to(jnp.arange(1, 81, dtype=x.dtype)[:, None] / 64, (80, *largest.shape))
    around = jnp.broadcast_to(jnp.arange(-7, 8, dtype=x.dtype)[:, None] / 512, (15, *largest.shape))
    return best(best(coarse) + around)[0] * largest


def _entropy_clip(x, options):
    a, largest = options.magnitude(x), _largest_clip(x, options)
    counts = jnp.ones_like(a) if options.counts is None else options.counts
    search = jax.vmap(partial(_search_entropy, options.grid), in_axes=(-1, -1, -1, None))
    return search(a, counts, largest, options.traced_bits)


@partial(jax.jit, static_argnums=0)
def _search_entropy(grid, a, counts, largest, traced_bits):
    bins, candidates = 2048, 128
    counts = jnp.where(a > 0, counts, 0.0)
    limits = largest * 2.0 ** -np.arange(48, dtype=a.dtype)
    beyond = jax.lax.map(lambda limit: jnp.sum(jnp.where(a > limit, counts, 0.0)), limits)
    limit = limits[jnp.maximum(jnp.sum(beyond <= 1e-3 * jnp.sum(counts)) - 1, 0)]
    bin_of = jnp.ceil(jnp.minimum(a / limit, 2.0) * bins).astype(jnp.int32) - 1
    histogram = jnp.zeros(bins, a.dtype).at[bin_of].add(counts, mode="drop")
    index = jnp.arange(bins)
    centres = (index.astype(a.dtype) + 0.5) / bins

    def divergence(end):
        rounded = fake_quantize(grid, centres, end.astype(a.dtype) / bins, traced_bits, jnp.ones(()))
        cell = jnp.cumsum(jnp.diff(rounded, prepend=rounded[:1]) != 0)  # bins of one level, numbered
        inside = jnp.where(index < end, histogram, 0.0)
        occupied = inside > 0
        level, spread = (jax.ops.segment_sum(v, cell, bins)[cell] for v in (inside, occupied.astype(a.dtype)))
        q = jnp.where(occupied, level / jnp.maximum(spread, 1.0), 0.0)
        last = jnp.where(cell == cell[end - 1], inside, 0.0)
        last = jnp.where(jnp.sum(last) > 0, last, jnp.where(index == end - 1, 1.0, 0.0))
        p = inside + last * ((jnp.sum(counts) - jnp.sum(inside)) / jnp.sum(last))
        p, q = (v / jnp.maximum(jnp.sum(counts), 1e-30) for v in (p, q))
        # The floor: outliers beyond an empty last level cost much, not infinitely much.
        return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-9)), 0.0))

    ends = jnp.arange(1, candidates + 1) * (bins // candidates)
    best = ends[jnp.argmin(jax.lax.map(divergence, ends))].astype(a.dtype) / bins
    return unless_exact(bits_of(grid, traced_bits), lambda: best * limit, lambda: largest)


def _lsq_clip(x, options):
    steps, _ = steps_of(options.grid._replace(levels="uniform"), options.traced_bits, x.dtype)
    return 2 * _mean(options.magnitude(x), options.counts) * jnp.sqrt(jnp.asarray(steps, x.dtype))


_CLIP_RULES = {
    "constant": _constant_clip,
    "absmax": _largest_clip,
    "percentile": _percentile_clip,
    "rms": _rms_clip,
    "mse": _least_squares_clip,
    "entropy": _entropy_clip,
    "lsq": _lsq_clip,
}
