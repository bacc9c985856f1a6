"""Run a folded network: a NumPy reference, and the same program in JAX.

The reference sums whole numbers in float64, which is exact below 2^53, and rounds every other operation to float32, one
after the other, as `qpde.deploy.program` defines it. The JAX network holds codes in float32, where sums below 2^24 are
exact in any order. Where a sum can be larger, it convolves in int32 instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qpde import stencils
from qpde.deploy.folded import Folded
from qpde.deploy.program import (
    EXACT_LIMIT,
    Affine,
    Clip,
    Concat,
    Conv,
    Kernel,
    Mean,
    Op,
    Pool,
    Program,
    Quantize,
    Resize,
    Smooth,
    Snap,
    accumulator_bound,
)
from qpde.models.images.segmentation import interpolation, resize

__all__ = ["evaluate", "run", "run_reference"]


def run_reference(folded: Folded, images: np.ndarray, *, return_states: bool = False) -> tuple:
    """Logits and all codes of a folded network, in NumPy.

    Args:
      folded: Result of `fold`.
      images: (N, H, W, C) float32.
      return_states: Whether the outputs of the stem and of every block are returned too.
    Returns:
      Logits (N, classes) float32, of pixels (N, H, W, classes), and the codes of every quantizer by name, "block0.q0"
      and so on, int16; with states also those, real numbers in float32.
    """
    images = _checked_images(folded, images)
    logits, codes, states = _outputs(folded, np.asarray(images, np.float32), _NUMPY)
    whole = {op.out for op in folded.ops if isinstance(op, Quantize)}
    codes = {name: value.astype(np.int16) if name in whole else value for name, value in codes.items()}
    return (logits, codes, states) if return_states else (logits, codes)


def run(folded: Folded, *, return_codes: bool = False, return_states: bool = False) -> Callable:
    """Make the jitted integer network in JAX.

    Args:
      folded: Result of `fold`.
      return_codes: Whether the codes of every quantizer are returned too.
      return_states: Whether the outputs of the stem and of every block are returned too.
    Returns:
      Function of images (N, H, W, C) float32: logits, as `run_reference` has them; with codes or states a tuple of the
      logits, then codes by name in float32, then states, real numbers in float32.
    """

    @jax.jit
    def compiled(images):
        logits, codes, states = evaluate(folded, images)
        more = (codes,) * return_codes + (states,) * return_states
        return (logits, *more) if more else logits

    def call(images: Float[Array | np.ndarray, "n h w c"]):
        """Logits of images, and what else was asked for."""
        return compiled(_checked_images(folded, images))

    return call


def evaluate(
    folded: Folded, images: Float[Array, "n h w c"], kernels: dict[str, Any] | None = None
) -> tuple[Float[Array, "n *pixels classes"], dict[str, Array], tuple[Array, ...]]:
    """Logits, codes and states of a folded network in JAX, to be traced.

    Args:
      folded: Result of `fold`.
      images: (N, H, W, C) float32.
      kernels: Kernel values by name, traced, in place of the program's own constants.
    Returns:
      Logits; the codes of every quantizer by name, as float32; the outputs of stem and blocks in real numbers.
    """
    bounds = accumulator_bound(folded)
    rules = {**_JAX, Conv: lambda op, kernel, x: _jax_conv(op, kernel, x, bounds.get(op.out), kernels)}
    return _outputs(folded, images, rules)


def _outputs(folded: Folded, images: Any, rules: dict[type, Callable]) -> tuple[Any, dict[str, Any], tuple]:
    """Logits, codes and states."""
    codes, values, wanted = {}, {}, {state.value for state in folded.states}

    def keep(op, value):
        if isinstance(op, (Quantize, Snap)):
            codes[op.out] = value
        if op.out in wanted:
            values[op.out] = value
        return value

    logits = _interpret(folded, images, rules, keep)
    logits = logits if folded.of_pixels else logits[:, 0, 0]
    real = [values[s.value] * np.float32(s.unit) for s in folded.states]
    return logits, codes, tuple(x.clip(0) if s.relu else x for x, s in zip(real, folded.states, strict=True))


def _checked_images(folded, images):
    shape = getattr(images, "shape", type(images).__name__)
    if len(shape) != 4 or isinstance(shape, str) or shape[-1] != folded.channels:
        raise ValueError(f"images must be (N, H, W, {folded.channels}); got shape {shape}")
    if images.dtype != np.float32:
        raise ValueError(f"images of dtype {images.dtype} must be float32: x.astype(np.float32), and scale them")
    if min(images.shape[1:3]) < (side := folded.smallest_image):
        raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} are too small: at least {side}x{side}")
    return images


def _interpret(program: Program, images: Any, rules: dict[type, Callable], keep: Callable[[Op, Any], Any]) -> Any:
    values, last = {"images": images}, {name: op.out for op in program.ops for name in op.inputs}
    for op in program.ops:
        inputs = [values[name] for name in op.inputs]
        own = (program.kernels[op.kernel],) if isinstance(op, Conv) else ()
        values[op.out] = keep(op, rules[type(op)](op, *own, *inputs))
        for name in op.inputs:
            if last[name] == op.out:
                values.pop(name, None)
    return values["logits"]


# NumPy: every rounding is written out.


def _numpy_conv(op: Conv, kernel: Kernel, x: np.ndarray) -> np.ndarray:
    values = (kernel.adjoint() if op.adjoint else kernel.values).astype(np.float64)
    kh, kw = values.shape[:2]
    x = np.pad(x.astype(np.float64), [(0, 0), (op.padding,) * 2, (op.padding,) * 2, (0, 0)])
    reach = [op.dilation * (k - 1) for k in (kh, kw)]
    height, width = ((n - r - 1) // op.stride + 1 for n, r in zip(x.shape[1:3], reach, strict=True))
    out: Any = 0.0
    for i in range(kh):
        for j in range(kw):
            top, left = i * op.dilation, j * op.dilation
            window = x[:, top : top + op.stride * (height - 1) + 1 : op.stride]
            window = window[:, :, left : left + op.stride * (width - 1) + 1 : op.stride]
            out = out + (window * values[i, j, 0] if kernel.depthwise else window @ values[i, j])
    return out.astype(np.float32)


def _affine(op: Affine, *inputs: Any) -> Any:
    total = None
    for x, factor in zip(inputs, op.factors, strict=True):
        term = x * factor.reshape((1,) * 3 + (-1,))
        total = term if total is None else total + term
    return total if op.bias is None else total + op.bias.reshape((1,) * 3 + (-1,))


def _numpy_snap(op: Snap, x: np.ndarray) -> np.ndarray:
    level = op.table[np.searchsorted(op.middles, np.abs(x), side="left")]
    return np.sign(x) * level if op.signed else np.where(x > 0, level, np.float32(0))


def _numpy_resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (interpolation(n, n_out) for n, n_out in zip(x.shape[1:3], size, strict=True))
    return np.einsum("ih,nhwc,jw->nijc", rows, x.astype(np.float64), columns, optimize=True).astype(np.float32)


def _numpy_smooth(op: Smooth, x: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(_jax_smooth(op, jnp.asarray(x)))


def _pool(op: Pool, x: Any) -> Any:
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    rows = x[:, ::2] + x[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) * np.float32(0.25)


_NUMPY: dict[type, Callable] = {
    Conv: _numpy_conv,
    Affine: _affine,
    Quantize: lambda op, x: np.clip(np.rint(x), np.float32(op.low), np.float32(op.high)),
    Snap: _numpy_snap,
    Clip: lambda op, x: np.clip(x, np.float32(op.low), np.float32(op.high)),
    Smooth: _numpy_smooth,
    Pool: _pool,
    Concat: lambda op, x, y: np.concatenate([x, y[..., : op.channels]], axis=-1),
    Resize: lambda op, x, like: _numpy_resize(x, like.shape[1:3]),
    Mean: lambda op, x: x.mean((1, 2), keepdims=True),
}


# JAX.


def _jax_conv(op: Conv, kernel: Kernel, x: jax.Array, bound: int | None, kernels: dict | None) -> jax.Array:
    values = kernel.values if kernels is None else kernels[op.kernel]
    if op.adjoint:
        values = values[::-1, ::-1] if kernel.depthwise else jnp.swapaxes(values[::-1, ::-1], 2, 3)
    is_exact = bound is None or bound < EXACT_LIMIT
    dtype = jnp.float32 if is_exact else jnp.int32
    sums = lax.conv_general_dilated(
        x.astype(dtype),
        jnp.asarray(values).astype(dtype),
        window_strides=(op.stride,) * 2,
        padding=[(op.padding,) * 2] * 2,
        rhs_dilation=(op.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] if kernel.depthwise else 1,
        precision="highest",
    ).astype(jnp.float32)
    if bound is None:
        return sums
    # A transformed convolution (Winograd's), which no CPU backend uses, leaves whole sums a little off.
    return lax.platform_dependent(sums, cpu=lambda s: s, default=jnp.round)


def _jax_snap(op: Snap, x: jax.Array) -> jax.Array:
    index = jnp.searchsorted(jnp.asarray(op.middles), jnp.abs(x), side="left")
    level = jnp.asarray(op.table)[index]
    return jnp.sign(x) * level if op.signed else jnp.where(x > 0, level, 0.0)


def _jax_smooth(op: Smooth, x: jax.Array) -> jax.Array:
    return stencils.smooth(x, steps=op.steps, gamma2=op.gamma2, eps=op.eps, kind=op.kind)


_JAX: dict[type, Callable] = {
    Affine: _affine,
    Quantize: lambda op, x: jnp.clip(jnp.round(x), float(op.low), float(op.high)),
    Snap: _jax_snap,
    Clip: lambda op, x: jnp.clip(x, op.low, op.high),
    Smooth: _jax_smooth,
    Pool: _pool,
    Concat: lambda op, x, y: jnp.concatenate([x, y[..., : op.channels]], axis=-1),
    Resize: lambda op, x, like: resize(x, (like.shape[1], like.shape[2])),
    Mean: lambda op, x: x.mean((1, 2), keepdims=True),
}
