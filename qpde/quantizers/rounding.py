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

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int8, Int32, Num, UInt8

from qpde.bits import EXACT_BITS
from qpde.checks import known_value
from qpde.devices import by_compiler, vary_alike
from qpde.quantizers.levels import INVERSE_STEPS, LEVEL_SETS, STEPS, look_up

WEIGHT_CLIP = 3.0
"""Published start of a weight's clip, in standard deviations of the weight."""
ACTIVATION_CLIP = 6.0
"""Published start of an activation's clip."""

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
) -> Num[Array, "*shape"]:
    """Round a weight to at most 2^bits - 1 levels, symmetric around zero, in [-clip, clip].

    With v = w / clip and n = 2^(bits-1) - 1 the value is clip * round(clamp(v, -1, 1) * n) / n, or the nearest of a
    level set. Gradients for an incoming g: g to w where |w| <= clip, 0 elsewhere, but g everywhere for 2 bits (the
    "calibrated" ternary weight, {-1, 0, 1} * clip, in every level set); to the clip the sum of g * (rounded v - v)
    inside and g * sign(v) outside.

    Args:
      w: Kernel (..., C), floating point; computed in float32 at least, returned in its own dtype.
      clip: Scalar or (C,), one for each output channel; positive and finite. A traced clip is not checked.
      bits: None returns w unchanged; else 2..32. From 16 bits on the result is the clamp, not rounded. A traced
        value is rounded to an integer and limited to 2..16; it has no gradient. Batch it by `jax.vmap`.
      levels: "uniform"; "pot", {0} and 2^-i; "apot", sums of powers of two (Li, Dong and Wang, ICLR 2020, 2 bits in
        each term). The sets of bits - 1 bits are used, the sign apart, scaled to a largest level of 1. Ties go to the
        smaller magnitude. At most 8 bits or at least 16; a traced 9..15 means 8.
      standardize: Round `standardize_weight(w)` instead of w; gradients flow through it.
      per_channel_statistics: Standardize each output channel by itself; without `standardize` it has no effect.
      gradient_scale: Multiplies the gradient of the clip and nothing else (Esser et al., LSQ, ICLR 2020, use
        1 / sqrt(numel * n)).
    Returns:
      Same shape and dtype as w. A NaN or an infinity stays what it is; with `standardize` it makes its group NaN.
    Raises:
      ValueError: Bits outside 2..32, an unknown level set, one with 9..15 bits, a clip that is not positive and
        finite, or of another shape.

    >>> quantize_weight(jnp.array([-2.0, -0.4, 0.1, 0.6]), 1.0, 2)
    Array([-1.,  0.,  0.,  1.], dtype=float32)
    """
    grid, traced_bits = resolve(levels, bits, signed=True)
    if bits is None:
        return jnp.asarray(w)
    if standardize:
        w = standardize_weight(w, per_channel=per_channel_statistics)
    gradient_scale = jnp.asarray(gradient_scale)
    return fake_quantize(grid, *_operands(w, clip, traced_bits, gradient_scale), traced_bits, gradient_scale)


def quantize_activation(
    x: Num[Array | np.ndarray, "*shape"],
    clip: ArrayLike,
    bits: ArrayLike | None,
    *,
    levels: str = "uniform",
    signed: bool = False,
    gradient_scale: ArrayLike = 1.0,
) -> Num[Array, "*shape"]:
    """Round an activation to at most 2^bits levels in [0, clip], or in [-clip, clip] if signed.

    With v = x / clip and n = 2^bits - 1 the value is clip * round(clamp(v, 0, 1) * n) / n, or the nearest of a level
    set (Choi et al., PACT, 2018). Gradients for an incoming g: g to x where 0 <= x <= clip, 0 elsewhere; to the clip
    the sum of g * (rounded v - v) inside, g above the clip and 0 below zero. Signed activations are
    `quantize_weight` without statistics.

    Args:
      x: (..., C), floating point; computed in float32 at least, returned in its own dtype.
      clip: Scalar or (C,); positive and finite. A traced clip is not checked.
      bits: None returns x unchanged; else as in `quantize_weight`.
      levels: "uniform", "pot" or "apot", as in `quantize_weight`; unsigned activations use the sets of `bits` bits.
      signed: For values of both signs (tanh, states of a graph).
      gradient_scale: Multiplies the gradient of the clip and nothing else.
    Returns:
      Same shape and dtype as x. A NaN or an infinity stays what it is.
    Raises:
      ValueError: As in `quantize_weight`.

    >>> quantize_activation(jnp.array([-1.0, 0.9, 2.2, 9.0]), 3.0, 2)
    Array([0., 1., 2., 3.], dtype=float32)
    """
    grid, traced_bits = resolve(levels, bits, signed=signed)
    if bits is None:
        return jnp.asarray(x)
    gradient_scale = jnp.asarray(gradient_scale)
    return fake_quantize(grid, *_operands(x, clip, traced_bits, gradient_scale), traced_bits, gradient_scale)


def standardize_weight(w: Num[Array | np.ndarray, "*shape"], *, per_channel: bool = False) -> Num[Array, "*shape"]:
    """(w - mean(w)) / std(w), std with the divisor N - 1; gradients flow through both statistics.

    Args:
      w: Kernel (..., C), floating point.
      per_channel: Statistics of each output channel (last axis) instead of the whole tensor.
    Returns:
      Same shape and dtype as w; where all values are equal, zeros up to the rounding of their mean, below 1.
    Raises:
      ValueError: Fewer than two values share a mean.
    """
    w = floating(w)
    axes = tuple(range(w.ndim - 1)) if per_channel else tuple(range(w.ndim))
    count = int(np.prod([w.shape[axis] for axis in axes], dtype=np.int64))
    if count < 2:
        raise ValueError(
            f"a weight of shape {w.shape} has {count} value(s) for each mean: standardization needs at least 2; "
            "use per_channel=False or do not standardize"
        )
    values = w.astype(compute_dtype(w))
    centred = values - jnp.mean(values, axis=axes, keepdims=True)
    variance = jnp.sum(centred * centred, axis=axes, keepdims=True) / (count - 1)
    # The floor is far below any trained weight; it keeps a constant tensor and its gradient finite.
    return (centred / jnp.sqrt(jnp.maximum(variance, 1e-24))).astype(w.dtype)


def quantization_step(clip: ArrayLike, bits: ArrayLike | None, *, signed: bool) -> Float[Array, "..."]:
    """Distance clip / n between uniform levels, n = 2^(bits-1) - 1 if signed, else 2^bits - 1.

    It is clip times the rounded 1 / n, which gives the same float in every program; a rounded value is an integer
    times it. From 16 bits on nothing is rounded, and the step returned is that of 16 bits.

    Args:
      clip: Any shape.
      bits: 2..32, or a traced scalar.
      signed: True for weights.
    Returns:
      The step, in the shape of the clip.
    Raises:
      ValueError: Bits None or outside 2..32.
    """
    grid, traced_bits = resolve("uniform", _require_bits(bits), signed=signed)
    clip = _as_clip(clip)
    return clip * steps_of(grid, traced_bits, clip.dtype)[1]


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
      w: Kernel (..., C).
      clip: Scalar or (C,).
      bits: 2..8, or a traced scalar, limited to 2..8.
      standardize: Standardize first, as in `quantize_weight`.
      per_channel_statistics: Use each channel's own statistics, as in `quantize_weight`.
    Returns:
      Codes: `codes` int8 in the shape of w, `scale` in the shape of the clip. An integer cannot be NaN: where a
      weight is not finite, the scale that it shares is NaN.
    Raises:
      ValueError: Bits None or outside 2..8; a clip that is not positive and finite, or of another shape.
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
      x: (..., C).
      clip: Scalar or (C,).
      signed: As in `quantize_activation`.
      bits: 2..8, or a traced scalar, limited to 2..8.
    Returns:
      Codes: `codes` in the shape of x, `scale` = clip / n in the shape of the clip. An integer cannot be NaN: where a
      value is not finite, the scale that it shares is NaN.
    Raises:
      ValueError: Bits None or outside 2..8; a clip that is not positive and finite, or of another shape.

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
      codes: int8 or uint8 (..., C).
      scale: Scalar or (C,), one for each channel.
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
      x: (..., C).
      clip: Scalar or (C,).
      bits: 2..8, or a traced scalar.
      levels: Level set of the quantizer.
      signed: Whether the quantizer is one of weights or signed activations.
    Returns:
      int32 in the shape of x, from -LARGEST_LEVEL to LARGEST_LEVEL.
    Raises:
      ValueError: Bits None or outside 2..8, an unknown level set, a clip that is not positive and finite, or of
        another shape.
    """
    grid, traced_bits = resolve(levels, _require_bits(bits), signed=signed)
    if grid.bits is not None and grid.bits > _CODE_BITS:
        raise ValueError(f"bits={bits} have too many levels to count: at most {_CODE_BITS}")
    code = _snap(grid, *_operands(x, clip), traced_bits).code
    number = LEVEL_SETS[levels].number(jnp.abs(code), bits_of(grid, traced_bits) - int(signed))
    return jnp.sign(code).astype(jnp.int32) * number


# One custom gradient for every row of the table.


class Grid(NamedTuple):
    """What is known of a quantizer when it is traced; `bits` is None if its value is traced too."""

    levels: str
    signed: bool
    bits: int | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(grid: Grid, x: Array, clip: Array, traced_bits: Array | None, gradient_scale: Array) -> Array:
    """The rounded x, with the gradients of the module's docstring."""
    snapped = _snap(grid, x, clip, traced_bits)
    y = unless_exact(
        bits_of(grid, traced_bits),
        lambda: snapped.code * snapped.step,
        lambda: jnp.clip(snapped.x, snapped.low, snapped.high),
    )
    # The clamp alone would turn an infinity into the clip, and a table a NaN into a level.
    return jnp.where(jnp.isfinite(snapped.x), y, snapped.x).astype(x.dtype)


def _fake_quantize_forward(grid, x, clip, traced_bits, gradient_scale):
    # Only the input is kept, in its own dtype: repeating the rounding is cheaper than reading it back.
    return fake_quantize(grid, x, clip, traced_bits, gradient_scale), (x, clip, traced_bits, gradient_scale)


def _fake_quantize_backward(grid, residuals, g):
    x, clip, traced_bits, gradient_scale = residuals
    snapped = _snap(grid, x, clip, traced_bits)
    inside = (snapped.x >= snapped.low) & (snapped.x <= snapped.high)
    passes = inside | (bits_of(grid, traced_bits) == 2) if grid.signed else inside
    grad_x = jnp.where(passes, g, jnp.zeros_like(g))

    # In steps: rounded v - v inside the range, the end of the range outside.
    slope = jnp.where(snapped.x < snapped.low, -snapped.steps if grid.signed else 0.0, snapped.code - snapped.t)
    slope = jnp.where(snapped.x > snapped.high, snapped.steps, slope)
    grad_clip = _sum_for_clip(g.astype(slope.dtype) * slope, clip.shape)
    grad_clip = grad_clip * snapped.inverse_steps * jnp.asarray(gradient_scale, slope.dtype)
    return grad_x, grad_clip.astype(clip.dtype), None, None


_fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)
fake_quantize = jax.jit(_fake_quantize, static_argnums=0)  # traced once for all layers of equal shapes


class _Snapped(NamedTuple):
    x: Array  # in the dtype of the computation
    t: Array  # x in steps
    code: Array  # t clamped and rounded
    low: Array  # ends of the range of x, broadcast along the channels
    high: Array
    step: Array
    steps: Array | float  # in one clip
    inverse_steps: Array | float


def _snap(grid: Grid, x: Array, clip: Array, traced_bits: Array | None) -> _Snapped:
    x = x.astype(compute_dtype(x))
    high = _along_channels(clip.astype(x.dtype), x.ndim)
    low = -high if grid.signed else jnp.zeros_like(high)
    steps, inverse_steps = steps_of(grid, traced_bits, x.dtype)
    # A product with one quotient: XLA rewrites a division by a constant, so that x / clip could round differently
    # under jit, and then codes would differ.
    t = x * (steps / high)
    clamped = jnp.clip(t, -steps if grid.signed else 0.0, steps)
    level_set, bits = LEVEL_SETS[grid.levels], bits_of(grid, traced_bits)
    magnitude_bits = _at_most(bits, level_set.largest_bits) - int(grid.signed)
    code = unless_exact(bits, lambda: level_set.snap(clamped, magnitude_bits), lambda: clamped)
    return _Snapped(x, t, code, low, high, high * inverse_steps, steps, inverse_steps)


def _encode(x, clip, bits, *, signed):
    grid, traced_bits = resolve("uniform", _require_bits(bits), signed=signed)
    if traced_bits is not None:
        traced_bits = jnp.minimum(traced_bits, _CODE_BITS)
    elif grid.bits is not None and grid.bits > _CODE_BITS:
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

    def total(values):
        if shape == ():
            rows = values.reshape(values.shape[0], math.prod(values.shape[1:]))
            return jnp.sum(jnp.dot(rows, jnp.ones(rows.shape[1], rows.dtype), precision="highest"))
        rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
        return jnp.dot(jnp.ones(rows.shape[0], rows.dtype), rows, precision="highest")

    return by_compiler(total)(values)


# Arguments.


def resolve(levels: str, bits: ArrayLike | None, *, signed: bool) -> tuple[Grid, Array | None]:
    """Splits the bits into what is static, in the grid, and what is traced, an int32 in 2..16."""
    if levels not in LEVEL_SETS:
        raise ValueError(f"unknown levels {levels!r}: choose one of {', '.join(LEVEL_SETS)}")
    if bits is None:
        return Grid(levels, signed, None), None
    if isinstance(bits, int | float | np.number):
        if not 2 <= bits <= 32 or bits != int(bits):
            raise ValueError(f"bits={bits} must be a whole number from 2 to 32, or None for no rounding")
        largest = LEVEL_SETS[levels].largest_bits
        if largest < bits < EXACT_BITS:
            raise ValueError(
                f"bits={bits} are too many for levels={levels!r}: at most {largest}, or {EXACT_BITS} for no rounding"
            )
        return Grid(levels, signed, min(int(bits), EXACT_BITS)), None
    bits = jnp.asarray(bits)
    if bits.shape != ():
        raise ValueError(f"bits have shape {bits.shape}, expected a scalar: use jax.vmap for several")
    return Grid(levels, signed, None), jnp.clip(jnp.round(bits), 2, EXACT_BITS).astype(jnp.int32)


def _require_bits(bits):
    if bits is None:
        raise ValueError("bits=None has no levels: give a number of bits")
    return bits


def _operands(x: ArrayLike, clip: ArrayLike, *others: Array | None) -> tuple[Array, Array]:
    """x and the clip, checked, and cast to vary over the devices as they and the others do."""
    x, clip = floating(x), _as_clip(clip)
    if clip.shape != () and clip.shape != x.shape[-1:]:
        raise ValueError(
            f"clip has shape {clip.shape}, but x of shape {x.shape} needs () or, one value for each channel, "
            f"{x.shape[-1:]}"
        )
    return vary_alike(x, clip, like=others)


def _as_clip(clip: ArrayLike) -> Array:
    value = known_value(clip)
    if value is not None and not np.all((value > 0) & (value < np.inf)):
        raise ValueError(f"clip={clip} must be positive and finite; `initial_clip` reads one off the data")
    clip = jnp.asarray(clip)
    return clip if jnp.issubdtype(clip.dtype, jnp.floating) else clip.astype(jnp.float32)


def floating(x: ArrayLike) -> Array:
    """x as an array, which must be floating."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}, expected a floating point type: convert it first")
    return x


def compute_dtype(x: Array):
    """Dtype of the computation: float64 for float64, else float32."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _along_channels(values: Array, ndim: int) -> Array:
    return values if values.ndim == 0 else values.reshape((1,) * (ndim - 1) + values.shape)


def bits_of(grid: Grid, traced_bits: Array | None) -> Array | int:
    """The bits, static or traced."""
    if grid.bits is not None:
        return grid.bits
    assert traced_bits is not None, "bits that are not static are traced"
    return traced_bits


def _at_most(bits: Array | int, limit: int) -> Array | int:
    return min(bits, limit) if isinstance(bits, int) else jnp.minimum(bits, limit)


def unless_exact(bits: Array | int, rounded: Callable[[], Array], exact: Callable[[], Array]) -> Array:
    """The rounded result, or from 16 bits on the exact one."""
    if isinstance(bits, int):
        return exact() if bits >= EXACT_BITS else rounded()
    return jnp.where(bits >= EXACT_BITS, exact(), rounded())


def steps_of(grid: Grid, traced_bits: Array | None, dtype) -> tuple[Array | float, Array | float]:
    """n and 1 / n."""
    if not LEVEL_SETS[grid.levels].has_steps:
        return 1.0, 1.0
    magnitude_bits = bits_of(grid, traced_bits) - int(grid.signed)
    return look_up(STEPS, magnitude_bits, dtype), look_up(INVERSE_STEPS, magnitude_bits, dtype)
