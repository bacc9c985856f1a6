"""Quantizers: real numbers to a few levels of a learned range, with the gradients that train them.

With v = t / clip, clip > 0 a learned number (or one for each channel) and b bits, the rounded tensor is

    weights, signed activations    clip * round(clamp(v, -1, 1) * n) / n,    n = 2^(b-1) - 1
    activations                    clip * round(clamp(v,  0, 1) * n) / n,    n = 2^b - 1
    level sets                     clip * sign(v) * the level nearest to min(|v|, 1)

The gradient of t is that of the clamp (straight-through; with two signed bits it is 1 everywhere), the gradient of the
clip is (rounded v - v) inside the range and the end of the range outside. Layout: the last axis holds the channels.
The bits are `None` (identity), a Python number, or a traced value: then one compiled program serves every width.

A quantizer also exists as integers: `encode_weight`, `encode_activation` and `dequantize`. Rounding is half-to-even.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int8, Int32, Num, UInt8

WEIGHT_CLIP = 3.0
"""Published start of a weight's clip, in standard deviations of the weight."""
ACTIVATION_CLIP = 6.0
"""Published start of an activation's clip."""

_EXACT_BITS = 16  # from here on only the clamp remains
_CODE_BITS = 8  # the widest integer code


class Codes(NamedTuple):
    """A tensor in integer form: `codes * scale`, see `dequantize`."""

    codes: Int8[Array, "..."] | UInt8[Array, "..."]
    scale: Float[Array, ""] | Float[Array, " C"]


def quantize_weight(
    w: Num[Array | np.ndarray, "*shape"],
    clip: ArrayLike,
    bits: ArrayLike | None,
    *,
    levels: str = "uniform",
    standardize: bool = False,
    per_channel_statistics: bool = False,
    gradient_scale: ArrayLike = 1.0,
) -> Num[Array | np.ndarray, "*shape"]:
    """Rounds a weight to at most 2^bits - 1 levels, symmetric around zero, in [-clip, clip].

    With v = w / clip and n = 2^(bits-1) - 1 the value is clip * round(clamp(v, -1, 1) * n) / n, or the nearest of a
    level set. Gradients for an incoming g: g to w where |w| <= clip, 0 elsewhere, but g everywhere for 2 bits (the
    "calibrated" ternary weight, {-1, 0, 1} * clip, in every level set); to the clip the sum of g * (rounded v - v)
    inside and g * sign(v) outside.

    Args:
      w: kernel (..., C), floating point; computed in float32 at least, returned in its own dtype.
      clip: scalar or (C,), one for each output channel; > 0. A traced clip is not checked.
      bits: None returns w unchanged; else 2..32. From 16 bits on the result is the clamp, not rounded. A traced
        value is rounded to an integer and limited to 2..16; it has no gradient. Batch it by `jax.vmap`.
      levels: "uniform"; "pot", {0} and 2^-i; "apot", sums of powers of two (Li, Dong and Wang, ICLR 2020, 2 bits in
        each term). The sets of bits - 1 bits are used, the sign apart, scaled to a largest level of 1. Ties go to the
        smaller magnitude. At most 8 bits or at least 16; a traced 9..15 means 8.
      standardize: round `standardize_weight(w)` instead of w; gradients flow through it.
      per_channel_statistics: standardize each output channel by itself; without `standardize` it has no effect.
      gradient_scale: multiplies the gradient of the clip and nothing else (Esser et al., LSQ, ICLR 2020, use
        1 / sqrt(numel * n)).
    Returns:
      Same shape and dtype as w. A NaN or an infinity stays what it is; with `standardize` it makes its group NaN.
    Raises:
      ValueError: bits outside 2..32, an unknown level set, one with 9..15 bits, a clip <= 0 or of another shape.

    >>> quantize_weight(jnp.array([-2.0, -0.4, 0.1, 0.6]), 1.0, 2)
    Array([-1.,  0.,  0.,  1.], dtype=float32)
    """
    grid, traced_bits = _resolve(levels, bits, signed=True)
    if bits is None:
        return w
    if standardize:
        w = standardize_weight(w, per_channel=per_channel_statistics)
    return _fake_quantize(grid, *_operands(w, clip), traced_bits, jnp.asarray(gradient_scale))


def quantize_activation(
    x: Num[Array | np.ndarray, "*shape"],
    clip: ArrayLike,
    bits: ArrayLike | None,
    *,
    levels: str = "uniform",
    signed: bool = False,
    gradient_scale: ArrayLike = 1.0,
) -> Num[Array | np.ndarray, "*shape"]:
    """Rounds an activation to at most 2^bits levels in [0, clip], or in [-clip, clip] if signed.

    With v = x / clip and n = 2^bits - 1 the value is clip * round(clamp(v, 0, 1) * n) / n, or the nearest of a level
    set (Choi et al., PACT, 2018). Gradients for an incoming g: g to x where 0 <= x <= clip, 0 elsewhere; to the clip
    the sum of g * (rounded v - v) inside, g above the clip and 0 below zero. Signed activations are
    `quantize_weight` without statistics.

    Args:
      x: (..., C), floating point; computed in float32 at least, returned in its own dtype.
      clip: scalar or (C,); > 0. A traced clip is not checked.
      bits: None returns x unchanged; else as in `quantize_weight`.
      levels: "uniform", "pot" or "apot", as in `quantize_weight`; unsigned activations use the sets of `bits` bits.
      signed: for values of both signs (tanh, states of a graph).
      gradient_scale: multiplies the gradient of the clip and nothing else.
    Returns:
      Same shape and dtype as x. A NaN or an infinity stays what it is.
    Raises:
      ValueError: as in `quantize_weight`.

    >>> quantize_activation(jnp.array([-1.0, 0.9, 2.2, 9.0]), 3.0, 2)
    Array([0., 1., 2., 3.], dtype=float32)
    """
    grid, traced_bits = _resolve(levels, bits, signed=signed)
    if bits is None:
        return x
    return _fake_quantize(grid, *_operands(x, clip), traced_bits, jnp.asarray(gradient_scale))


def standardize_weight(w: Num[Array | np.ndarray, "*shape"], *, per_channel: bool = False) -> Num[Array, "*shape"]:
    """(w - mean(w)) / std(w), std with the divisor N - 1; gradients flow through both statistics.

    Args:
      w: kernel (..., C), floating point.
      per_channel: statistics of each output channel (last axis) instead of the whole tensor.
    Returns:
      Same shape and dtype as w; where all values are equal, zeros up to the rounding of their mean, below 1.
    Raises:
      ValueError: fewer than two values share a mean.
    """
    w = _floating(w)
    axes = tuple(range(w.ndim - 1)) if per_channel else tuple(range(w.ndim))
    count = int(np.prod([w.shape[axis] for axis in axes], dtype=np.int64))
    if count < 2:
        raise ValueError(
            f"a weight of shape {w.shape} has {count} value(s) for each mean: standardization needs at least 2; "
            "use per_channel=False or do not standardize"
        )
    values = w.astype(_compute_dtype(w))
    centred = values - jnp.mean(values, axis=axes, keepdims=True)
    variance = jnp.sum(centred * centred, axis=axes, keepdims=True) / (count - 1)
    # The floor is far below any trained weight; it keeps a constant tensor and its gradient finite.
    return (centred / jnp.sqrt(jnp.maximum(variance, 1e-24))).astype(w.dtype)


def quantization_step(clip: ArrayLike, bits: ArrayLike | None, *, signed: bool) -> Float[Array, "..."]:
    """Distance clip / n between uniform levels, n = 2^(bits-1) - 1 if signed, else 2^bits - 1.

    It is clip times the rounded 1 / n, which gives the same float in every program; a rounded value is an integer
    times it. From 16 bits on nothing is rounded, and the step returned is that of 16 bits.

    Args:
      clip: any shape.   bits: 2..32, or a traced scalar.   signed: True for weights.
    Returns:
      The step, in the shape of the clip.
    Raises:
      ValueError: bits None or outside 2..32.
    """
    grid, traced_bits = _resolve("uniform", _require_bits(bits), signed=signed)
    clip = _as_clip(clip)
    return clip * _steps(grid, traced_bits, clip.dtype)[1]


def encode_weight(
    w: Num[Array | np.ndarray, "..."],
    clip: ArrayLike,
    bits: ArrayLike | None,
    *,
    standardize: bool = False,
    per_channel_statistics: bool = False,
) -> Codes:
    """The integer form of a uniform `quantize_weight`: int8 codes in [-n, n] and scale = clip / n.

    `dequantize(*encode_weight(w, clip, bits))` equals `quantize_weight(w, clip, bits)` bit for bit in float32, under
    jit or not (a weight of lower precision: up to the conversion to it). With `standardize` this holds for two
    programs that sum the statistics in the same order; encode `standardize_weight(w)` once to be sure of it.

    Args:
      w: kernel (..., C).   clip: scalar or (C,).
      bits: 2..8, or a traced scalar, limited to 2..8.
      standardize, per_channel_statistics: as in `quantize_weight`.
    Returns:
      Codes: `codes` int8 in the shape of w, `scale` in the shape of the clip. An integer cannot be NaN: where a
      weight is not finite, the scale that it shares is NaN.
    Raises:
      ValueError: bits None or outside 2..8; a clip <= 0 or of another shape.
    """
    if standardize:
        w = standardize_weight(w, per_channel=per_channel_statistics)
    return _encode(w, clip, bits, signed=True)


def encode_activation(
    x: Num[Array | np.ndarray, "..."], clip: ArrayLike, bits: ArrayLike | None, *, signed: bool = False
) -> Codes:
    """The integer form of a uniform `quantize_activation`: codes in [0, n] (uint8), or in [-n, n] (int8) if signed.

    `dequantize(*encode_activation(x, clip, bits))` equals `quantize_activation(x, clip, bits)` bit for bit in float32,
    under jit or not.

    Args:
      x: (..., C).   clip: scalar or (C,).   signed: as in `quantize_activation`.
      bits: 2..8, or a traced scalar, limited to 2..8.
    Returns:
      Codes: `codes` in the shape of x, `scale` = clip / n in the shape of the clip. An integer cannot be NaN: where a
      value is not finite, the scale that it shares is NaN.
    Raises:
      ValueError: bits None or outside 2..8; a clip <= 0 or of another shape.

    >>> encode_activation(jnp.array([0.0, 0.5, 7.0]), 1.5, 4).codes
    Array([ 0,  5, 15], dtype=uint8)
    """
    return _encode(x, clip, bits, signed=signed)


def dequantize(
    codes: Int8[Array | np.ndarray, "*shape"] | UInt8[Array | np.ndarray, "*shape"],
    scale: Float[ArrayLike, ""] | Float[Array | np.ndarray, " C"],
) -> Float[Array, "*shape"]:
    """codes * scale: the real numbers that integer codes stand for.

    Args:
      codes: int8 or uint8 (..., C).   scale: scalar or (C,), one for each channel.
    Returns:
      Array in the shape of the codes and the dtype of the scale.
    """
    codes, scale = jnp.asarray(codes), jnp.asarray(scale)
    return codes.astype(scale.dtype) * _along_channels(scale, codes.ndim)


LARGEST_LEVEL = 3840
"""Of `level_index`, for up to 8 bits of any level set."""


def level_index(
    x: Num[Array | np.ndarray, "*shape"],
    clip: ArrayLike,
    bits: ArrayLike | None,
    *,
    levels: str = "uniform",
    signed: bool = False,
) -> Int32[Array, "*shape"]:
    """A whole number for the level that every value is rounded to, to count with: equal levels have equal numbers.

    The numbers keep the levels' order, and 0 is the level 0. Of uniform levels they are the integer codes, of powers of
    two 127 + log2(level / clip) and of additive powers of two the sum's integer multiple, with the level's sign.

    Args:
      x: (..., C).   clip: scalar or (C,).   bits: 2..8, or a traced scalar.   levels, signed: of the quantizer.
    Returns:
      int32 in the shape of x, from -LARGEST_LEVEL to LARGEST_LEVEL.
    Raises:
      ValueError: bits None or outside 2..8, an unknown level set, a clip <= 0 or of another shape.
    """
    grid, traced_bits = _resolve(levels, _require_bits(bits), signed=signed)
    if grid.bits is not None and grid.bits > _CODE_BITS:
        raise ValueError(f"bits={bits} have too many levels to count: at most {_CODE_BITS}")
    code = _snap(grid, *_operands(x, clip), traced_bits).code
    number = _LEVEL_SETS[levels].number(jnp.abs(code), _bits(grid, traced_bits) - int(signed))
    return jnp.sign(code).astype(jnp.int32) * number


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
        "entropy"     least divergence of the rounded from the exact distribution, over i/128 of max a
        "lsq"         the clip whose step clip / n is 2 mean(a) / sqrt(n) (Esser et al., LSQ, ICLR 2020, section 2.1)

    The squared error as a function of the clip has many local minima, hence a search over a grid rather than descent.
    The entropy rule, the idea of Migacz (8-bit inference with TensorRT, 2017), sorts a into 2048 bins. P is their share
    of the data, what lies beyond the clip counted with its last level; Q is the share of what lies inside, of which
    only the levels are known, each spread evenly over the occupied bins that round to it. It minimises
    sum P log(P / Q). (TensorRT counts the outliers in one bin; where data are few, its chance occupation decides.)
    Zeros are left out: every clip represents them exactly, and after a ReLU they outweigh all else.

    Args:
      x: representative data (..., C): an activation, or the weight as it is rounded, so after `standardize_weight`
        where that is on.
      bits: as in `quantize_weight`; used by "mse", "entropy" and "lsq". From 16 bits on, or None, the first two are
        "absmax".
      signed: True for weights and signed activations.
      method: a name above.
      per_channel: one clip for each channel (last axis) instead of a single one.
      percentile: in (0, 100].   rms_factor: > 0.   levels: the set that "mse" and "entropy" round to.
      counts: how often each value occurs, >= 0; None is once. So a histogram of a stream, its bins' values in x, gives
        the clip of the stream.
    Returns:
      The clip, () or (C,), in float32 (float64 for float64 data). It is positive: where the rule gives 0 (all a are 0)
      it is the constant. It is NaN where the rule meets a NaN. No gradient flows to x.
    Raises:
      ValueError: an unknown method, no data, a parameter out of range, "lsq" with bits None.
    """
    if method not in _CLIP_RULES:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(_CLIP_RULES)}")
    if method == "lsq" and bits is None:
        raise ValueError("method='lsq' needs a number of bits, got None: choose another method")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} must be above 0 and at most 100")
    if not rms_factor > 0:
        raise ValueError(f"rms_factor={rms_factor} must be positive")
    grid, traced_bits = _resolve(levels, _EXACT_BITS if bits is None else bits, signed=signed)
    x = _floating(x)
    if x.size == 0:
        raise ValueError(f"no data to start a clip from: x has shape {x.shape}")
    if per_channel and x.ndim == 0:
        raise ValueError("per_channel=True needs an axis of channels, but x is a scalar")
    x = jax.lax.stop_gradient(x.astype(_compute_dtype(x)))
    # One column for each group that shares a clip: every rule reduces the first axis.
    columns = x.reshape(-1, x.shape[-1] if per_channel else 1)
    if counts is not None:
        counts = jnp.asarray(counts, x.dtype).reshape(columns.shape)
    options = _ClipOptions(grid, traced_bits, percentile, rms_factor, counts)
    clip = _CLIP_RULES[method](columns, options)
    clip = jnp.where(clip <= 0, _constant_clip(columns, options), clip)
    return clip if per_channel else clip[0]


# One custom gradient for every row of the table.


class _Grid(NamedTuple):
    """What is known of a quantizer when it is traced; `bits` is None if its value is traced too."""

    levels: str
    signed: bool
    bits: int | None


@partial(jax.jit, static_argnums=0)  # traced once for all layers of equal shapes
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(grid: _Grid, x: Array, clip: Array, traced_bits: Array | None, gradient_scale: Array) -> Array:
    snapped = _snap(grid, x, clip, traced_bits)
    y = _unless_exact(
        _bits(grid, traced_bits),
        lambda: snapped.code * snapped.step,
        lambda: jnp.clip(snapped.x, snapped.low, snapped.high),
    )
    # The clamp alone would turn an infinity into the clip, and a table a NaN into a level.
    return jnp.where(jnp.isfinite(snapped.x), y, snapped.x).astype(x.dtype)


def _fake_quantize_forward(grid, x, clip, traced_bits, gradient_scale):
    # Only the input is kept, in its own dtype: repeating the rounding is cheaper than reading it back.
    return _fake_quantize(grid, x, clip, traced_bits, gradient_scale), (x, clip, traced_bits, gradient_scale)


def _fake_quantize_backward(grid, residuals, g):
    x, clip, traced_bits, gradient_scale = residuals
    snapped = _snap(grid, x, clip, traced_bits)
    inside = (snapped.x >= snapped.low) & (snapped.x <= snapped.high)
    passes = inside | (_bits(grid, traced_bits) == 2) if grid.signed else inside
    grad_x = jnp.where(passes, g, jnp.zeros_like(g))

    # In steps: rounded v - v inside the range, the end of the range outside.
    slope = jnp.where(snapped.x < snapped.low, -snapped.steps if grid.signed else 0.0, snapped.code - snapped.t)
    slope = jnp.where(snapped.x > snapped.high, snapped.steps, slope)
    grad_clip = _sum_for_clip(g.astype(slope.dtype) * slope, clip.shape)
    grad_clip = grad_clip * snapped.inverse_steps * jnp.asarray(gradient_scale, slope.dtype)
    return grad_x, grad_clip.astype(clip.dtype), None, None


_fake_quantize.__wrapped__.defvjp(_fake_quantize_forward, _fake_quantize_backward)


class _Snapped(NamedTuple):
    x: Array  # in the dtype of the computation
    t: Array  # x in steps
    code: Array  # t clamped and rounded
    low: Array  # ends of the range of x, broadcast along the channels
    high: Array
    step: Array
    steps: Array | float  # in one clip
    inverse_steps: Array | float


def _snap(grid: _Grid, x: Array, clip: Array, traced_bits: Array | None) -> _Snapped:
    x = x.astype(_compute_dtype(x))
    high = _along_channels(clip.astype(x.dtype), x.ndim)
    low = -high if grid.signed else jnp.zeros_like(high)
    steps, inverse_steps = _steps(grid, traced_bits, x.dtype)
    # A product with one quotient: XLA rewrites a division by a constant, so that x / clip could round differently
    # under jit, and then codes would differ.
    t = x * (steps / high)
    clamped = jnp.clip(t, -steps if grid.signed else 0.0, steps)
    level_set, bits = _LEVEL_SETS[grid.levels], _bits(grid, traced_bits)
    magnitude_bits = _at_most(bits, level_set.largest_bits) - int(grid.signed)
    code = _unless_exact(bits, lambda: level_set.snap(clamped, magnitude_bits), lambda: clamped)
    return _Snapped(x, t, code, low, high, high * inverse_steps, steps, inverse_steps)


def _encode(x, clip, bits, *, signed):
    grid, traced_bits = _resolve("uniform", _require_bits(bits), signed=signed)
    if grid.bits is None:
        traced_bits = jnp.minimum(traced_bits, _CODE_BITS)
    elif grid.bits > _CODE_BITS:
        raise ValueError(f"bits={bits} do not fit an integer code: at most {_CODE_BITS}")
    x, clip = _operands(x, clip)
    snapped = _snap(grid, x, clip, traced_bits)
    poison = _sum_for_clip(jnp.where(jnp.isfinite(snapped.x), 0.0, jnp.nan), clip.shape)
    scale = snapped.step.reshape(clip.shape) + poison
    return Codes(snapped.code.astype(jnp.int8 if signed else jnp.uint8), scale)


def _sum_for_clip(values: Array, shape: tuple[int, ...]) -> Array:
    """Sums values (..., C) to the shape of a clip, () or (C,)."""
    # A product with ones: XLA's CPU backend runs the sum of a fused expression one number at a time, and this three to
    # five times faster. The first axis stays, for it may be a batch over several devices.
    if values.ndim < 2:
        return jnp.sum(values) if shape == () else values
    if shape == ():
        rows = values.reshape(values.shape[0], -1)
        return jnp.sum(jnp.dot(rows, jnp.ones(rows.shape[1], rows.dtype), precision="highest"))
    rows = values.reshape(-1, values.shape[-1])
    return jnp.dot(jnp.ones(rows.shape[0], rows.dtype), rows, precision="highest")


# Level sets. Each rounds t in [-n, n] to the nearest level of a magnitude of `bits` bits, an int or a traced one.


class _LevelSet(NamedTuple):
    snap: Callable[[Array, Array | int], Array]
    number: Callable[[Array, Array | int], Array]  # of a snapped magnitude, see `level_index`
    has_steps: bool  # levels are the integers up to n = 2^bits - 1; otherwise n = 1
    largest_bits: int


def _snap_uniform(t, bits):
    del bits
    # jnp.round, but four times as fast on XLA's CPU backend: adding 1.5 * 2^(mantissa bits) leaves t, rounded half to
    # even, in the last bits. Read as integers, lest the sum be simplified away; integers also know no -0.
    mantissa_bits = jnp.finfo(t.dtype).nmant
    shift = np.array(1.5 * 2.0**mantissa_bits, t.dtype)
    pattern = shift.view(np.int32 if mantissa_bits == 23 else np.int64)
    return (jax.lax.bitcast_convert_type(t + shift, pattern.dtype) - pattern).astype(t.dtype)


def _snap_pot(t, bits):
    magnitude = jnp.abs(t).astype(jnp.float32)
    # Adding one less than half the mantissa carries into the exponent what lies above 1.5 times a power of two.
    pattern = jax.lax.bitcast_convert_type(magnitude, jnp.int32) + 0x3FFFFF
    power = jax.lax.bitcast_convert_type(pattern & 0x7F800000, jnp.float32)
    smallest = _look_up(_POT_SMALLEST, bits, jnp.float32)
    level = jnp.where(magnitude > 0.5 * smallest, jnp.maximum(power, smallest), 0.0)
    return jnp.sign(t) * level.astype(t.dtype)


def _snap_apot(t, bits):
    table, starts, counts = _apot_table()
    if isinstance(bits, int):
        table, start, count = table[starts[bits] :][: counts[bits] + 1], 0, float(counts[bits])
    else:
        start, count = _look_up(starts, bits, jnp.int32), _look_up(counts, bits, t.dtype)
    interval = start + jnp.ceil(jnp.abs(t) * count).astype(jnp.int32)
    level = jnp.asarray(table, t.dtype).at[interval].get(mode="clip")
    return jnp.sign(t) * level


def _number_uniform(magnitude, bits):
    del bits
    return magnitude.astype(jnp.int32)


def _number_pot(magnitude, bits):
    del bits
    return jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32) >> 23  # the exponent


def _number_apot(magnitude, bits):
    units = _look_up(_apot_table()[2] / 2, bits, jnp.float32)
    return jnp.round(magnitude.astype(jnp.float32) * units).astype(jnp.int32)


_LEVEL_SETS = {
    "uniform": _LevelSet(_snap_uniform, _number_uniform, has_steps=True, largest_bits=_EXACT_BITS),
    "pot": _LevelSet(_snap_pot, _number_pot, has_steps=False, largest_bits=8),
    "apot": _LevelSet(_snap_apot, _number_apot, has_steps=False, largest_bits=8),
}

# Indexed by the bits of a magnitude, from 1. Tables rather than formulas, so that static and traced bits give the same
# float on every device.
_STEPS = 2.0 ** np.arange(_EXACT_BITS + 1) - 1
_INVERSE_STEPS = 1 / np.maximum(_STEPS, 1)
# 2^-(2^bits - 2), but not so small that float32 would lose the midpoint to zero.
_POT_SMALLEST = 2.0 ** -np.minimum(2.0 ** np.arange(9) - 2, 125)


@cache
def _apot_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each number of bits the nearest level in every interval ((k - 1) / count, k / count].

    The levels are multiples of 2 / count, so a midpoint is never inside an interval and one look-up finds the level.
    """
    tables, counts = [np.zeros(1)], [0]
    for bits in range(1, 9):
        levels = _apot_units(bits)
        midpoints = levels[1:] + levels[:-1]  # in half units
        tables.append(levels[np.searchsorted(midpoints, np.arange(2 * levels[-1] + 1))] / levels[-1])
        counts.append(2 * levels[-1])
    starts = np.cumsum([0] + [len(table) for table in tables[:-1]])
    return np.concatenate(tables), starts, np.array(counts)


def _apot_units(bits: int) -> np.ndarray:
    """The additive powers of two of `bits` bits, sorted, as integers (their common scale is free).

    Bits are spent in pairs: with m = bits // 2 pairs, pair i adds one of {0, 2^-i, 2^-(i+m), 2^-(i+2m)}; the odd bit,
    if there is one, adds 0 or 2^-2m, and the last exponents of the pairs move down one place to make room.
    """
    pairs, odd = divmod(bits, 2)
    terms = [(i, i + pairs, i + 2 * pairs + odd) for i in range(pairs)] + [(2 * pairs,)] * odd
    last = max(exponent for term in terms for exponent in term)
    sums = np.zeros(1, np.int64)
    for term in terms:
        sums = np.add.outer(sums, [0, *(2 ** (last - exponent) for exponent in term)]).ravel()
    return np.sort(sums)


# Rules for the start of a clip: columns (n, groups) to one clip for each group.


class _ClipOptions(NamedTuple):
    grid: _Grid
    traced_bits: Array | None
    percentile: float
    rms_factor: float
    counts: Array | None

    def magnitude(self, x):
        return jnp.abs(x) if self.grid.signed else jnp.maximum(x, 0.0)


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
        squares = (x - _fake_quantize(grid, x, fraction * largest, traced_bits, jnp.ones(()))) ** 2
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
    bin_of = jnp.clip(jnp.ceil(a * (bins / largest)).astype(jnp.int32) - 1, 0, bins - 1)
    histogram = jnp.zeros(bins, a.dtype).at[bin_of].add(jnp.where(a > 0, counts, 0.0))
    index = jnp.arange(bins)
    centres = (index.astype(a.dtype) + 0.5) / bins

    def divergence(end):
        rounded = _fake_quantize(grid, centres, end.astype(a.dtype) / bins, traced_bits, jnp.ones(()))
        cell = jnp.cumsum(jnp.diff(rounded, prepend=rounded[:1]) != 0)  # bins of one level, numbered
        inside = jnp.where(index < end, histogram, 0.0)
        occupied = inside > 0
        level, spread = (jax.ops.segment_sum(v, cell, bins)[cell] for v in (inside, occupied.astype(a.dtype)))
        q = jnp.where(occupied, level / jnp.maximum(spread, 1.0), 0.0)
        last = jnp.where(cell == cell[end - 1], inside, 0.0)
        last = jnp.where(jnp.sum(last) > 0, last, jnp.where(index == end - 1, 1.0, 0.0))
        p = inside + last * ((jnp.sum(histogram) - jnp.sum(inside)) / jnp.sum(last))
        p, q = (v / jnp.maximum(jnp.sum(histogram), 1e-30) for v in (p, q))
        # The floor: outliers beyond an empty last level cost much, not infinitely much.
        return jnp.sum(jnp.where(p > 0, p * jnp.log(p / jnp.maximum(q, 1e-9)), 0.0))

    ends = jnp.arange(1, candidates + 1) * (bins // candidates)
    best = ends[jnp.argmin(jax.lax.map(divergence, ends))].astype(a.dtype) / bins
    return _unless_exact(_bits(grid, traced_bits), lambda: best * largest, lambda: largest)


def _lsq_clip(x, options):
    steps, _ = _steps(options.grid._replace(levels="uniform"), options.traced_bits, x.dtype)
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


# Arguments.


def _resolve(levels: str, bits: ArrayLike | None, *, signed: bool) -> tuple[_Grid, Array | None]:
    """Splits the bits into what is static, in the grid, and what is traced, an int32 in 2..16."""
    if levels not in _LEVEL_SETS:
        raise ValueError(f"unknown levels {levels!r}: choose one of {', '.join(_LEVEL_SETS)}")
    if bits is None:
        return _Grid(levels, signed, None), None
    if isinstance(bits, int | float | np.number):
        if not 2 <= bits <= 32 or bits != int(bits):
            raise ValueError(f"bits={bits} must be a whole number from 2 to 32, or None for no rounding")
        largest = _LEVEL_SETS[levels].largest_bits
        if largest < bits < _EXACT_BITS:
            raise ValueError(
                f"bits={bits} are too many for levels={levels!r}: at most {largest}, or {_EXACT_BITS} for no rounding"
            )
        return _Grid(levels, signed, min(int(bits), _EXACT_BITS)), None
    bits = jnp.asarray(bits)
    if bits.shape != ():
        raise ValueError(f"bits have shape {bits.shape}, expected a scalar: use jax.vmap for several")
    return _Grid(levels, signed, None), jnp.clip(jnp.round(bits), 2, _EXACT_BITS).astype(jnp.int32)


def _require_bits(bits):
    if bits is None:
        raise ValueError("bits=None has no levels: give a number of bits")
    return bits


def _operands(x: ArrayLike, clip: ArrayLike) -> tuple[Array, Array]:
    x, clip = _floating(x), _as_clip(clip)
    if clip.shape != () and clip.shape != x.shape[-1:]:
        raise ValueError(
            f"clip has shape {clip.shape}, but x of shape {x.shape} needs () or, one value for each channel, "
            f"{x.shape[-1:]}"
        )
    return x, clip


def _as_clip(clip: ArrayLike) -> Array:
    # Only values on the host are checked: reading one from the device would stall it.
    if not isinstance(clip, Array) and not np.all(np.asarray(clip) > 0):
        raise ValueError(f"clip={clip} must be positive")
    clip = jnp.asarray(clip)
    return clip if jnp.issubdtype(clip.dtype, jnp.floating) else clip.astype(jnp.float32)


def _floating(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}, expected a floating point type: convert it first")
    return x


def _compute_dtype(x: Array):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _along_channels(values: Array, ndim: int) -> Array:
    return values if values.ndim == 0 else values.reshape((1,) * (ndim - 1) + values.shape)


def _bits(grid: _Grid, traced_bits: Array | None) -> Array | int:
    return traced_bits if grid.bits is None else grid.bits


def _at_most(bits: Array | int, limit: int) -> Array | int:
    return min(bits, limit) if isinstance(bits, int) else jnp.minimum(bits, limit)


def _unless_exact(bits: Array | int, rounded: Callable[[], Array], exact: Callable[[], Array]) -> Array:
    if isinstance(bits, int):
        return exact() if bits >= _EXACT_BITS else rounded()
    return jnp.where(bits >= _EXACT_BITS, exact(), rounded())


def _steps(grid: _Grid, traced_bits: Array | None, dtype) -> tuple[Array | float, Array | float]:
    """n and 1 / n."""
    if not _LEVEL_SETS[grid.levels].has_steps:
        return 1.0, 1.0
    magnitude_bits = _bits(grid, traced_bits) - int(grid.signed)
    return _look_up(_STEPS, magnitude_bits, dtype), _look_up(_INVERSE_STEPS, magnitude_bits, dtype)


def _look_up(table: np.ndarray, index: Array | int, dtype) -> Array | float:
    if isinstance(index, int):
        return float(table[index])
    return jnp.asarray(table, dtype).at[index].get(mode="clip")
