"""Pieces that every network shares: starting kernels, depthwise kernels, batch norm as pure functions, pooling."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from qpde.bits import EXACT_BITS
from qpde.devices import by_compiler

__all__ = [
    "NORM_EPSILON",
    "Mode",
    "Observe",
    "Quantizer",
    "average_pool",
    "batch_moments",
    "depthwise_bits",
    "divide_by_rms",
    "he_normal",
    "he_normals",
    "is_depthwise",
    "moments",
    "moved",
    "normalize",
    "row",
]

NORM_EPSILON = 1e-5
TINY = 1e-12  # below it a mean square counts as zero


class Quantizer(NamedTuple):
    """What a quantizer of a network is, for those who observe it: see `qpde.quantizers` for bits, signed, levels."""

    is_weight: bool
    bits: Any
    signed: bool
    levels: str


Observe = Callable[[Array, Array, Quantizer], tuple[Any, Array]]
"""(x, clip, quantizer) -> (record, clip): called with what every quantizer is about to round and its present clip. The
clip it returns is used in this call of the network, the record is kept: see `observe` of the networks' `__call__`."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """How one call of a network runs.

    Attributes:
      train: Normalise by the batch's statistics and update the running ones.
      momentum: Share of the running statistics that is kept; 0 stores the batch's own.
      observe: Sees what every quantizer rounds, or None.
      power_iterations: Power iterations of each spectral norm in this call, from the carried vector on; at least 1.
      compute_dtype: Dtype of the convolutions' products; everything between them is float32.
    """

    train: bool = False
    momentum: float = 0.9
    observe: Observe | None = None
    power_iterations: int = 1
    compute_dtype: str = "float32"


def he_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "kh kw c_in c_out"]:
    """Kernel (kh, kw, I, O) from N(0, 2 / (kh kw O)), fan-out; a depthwise kernel (I = 1) feeds one channel each."""
    return he_normals(key, [shape])[0]


def he_normals(key: PRNGKeyArray, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """`he_normal` kernels of several shapes from one draw: each draw costs compile time."""
    sizes = [math.prod(shape) for shape in shapes]
    draws = jnp.split(jax.random.normal(key, (sum(sizes),)), list(itertools.accumulate(sizes))[:-1])
    kernels = []
    for draw, (height, width, inputs, outputs) in zip(draws, shapes, strict=True):
        fan_out = height * width * (1 if inputs == 1 and height > 1 else outputs)
        kernels.append(math.sqrt(2 / fan_out) * draw.reshape(height, width, inputs, outputs))
    return kernels


def batch_moments(x: Float[Array, "*pixels c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and biased variance of x (..., C) per channel, in one pass: exact to some 1e-7 of the mean of squares."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.maximum((x * x).mean(axes) - mean * mean, 0)


def moments(
    x: Float[Array, "*pixels c"], running: Mapping[str, Array], mode: Mode
) -> tuple[Float[Array, " c"], Any, dict]:
    """What a norm of x (..., C) normalises by, and the running statistics after it.

    In training these are the batch's moments, and the running ones move towards them by 1 - momentum; the running
    variance is the unbiased one, as the published nets store it, while the batch is normalised by the biased one. A
    batch of nothing has no moments: the running ones stay.

    Args:
      x: (..., C).
      running: {"mean": (C,)[, "var": (C,)]}; a mean-only norm has no "var".
      mode: Mode of the call.
    Returns:
      mean (C,), variance (C,) or None, updated running statistics.
    """
    if not mode.train or 0 in x.shape:
        return running["mean"], running.get("var"), dict(running)
    mean, var = batch_moments(x)
    count = x.size // x.shape[-1]
    batch = {"mean": mean, "var": var * (count / max(count - 1, 1))}
    updated = {k: moved(v, jax.lax.stop_gradient(batch[k]), mode.momentum) for k, v in running.items()}
    return mean, var, updated


def moved(running: Array, batch: Array, momentum: float) -> Array:
    """A running statistic after a batch; at momentum 0 the batch's own, even where the running one is infinite."""
    return jnp.where(momentum == 0, batch, momentum * running + (1 - momentum) * batch)


def normalize(
    x: Float[Array, "n h w c"], params: Mapping[str, Array], mean: Float[Array, " c"], var: Float[Array, " c"]
) -> Float[Array, "n h w c"]:
    """(x - mean) / sqrt(var + 1e-5) * scale + bias per channel, with params {"scale": (C,), "bias": (C,)}."""
    scale = params["scale"] * jax.lax.rsqrt(var + NORM_EPSILON)
    return x * row(scale) + row(params["bias"] - mean * scale)


def divide_by_rms(x: Float[Array, "*shape"], mean_square: Float[Array, ""]) -> Float[Array, "*shape"]:
    """x / sqrt(m); with m the mean square of all numbers of x together, they have mean square 1 then."""
    return x * jax.lax.rsqrt(jnp.maximum(mean_square, TINY))


def row(v: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    """A per-channel vector (C,) as (1, 1, 1, C)."""
    return v[None, None, None, :]


def average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h_half w_half c"]:
    """2x2 means of x (N, H, W, C) at stride 2; an odd last row or column is left out."""

    def pooled(x):
        n, h, w, c = x.shape
        return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))

    return by_compiler(pooled, like=0)(x)


def is_depthwise(shape: tuple[int, ...]) -> bool:
    """Whether a kernel inside a block, HWIO, is depthwise: one input per output."""
    return len(shape) == 4 and shape[2] == 1


def depthwise_bits(bits: Any) -> Any:
    """Bits of a depthwise kernel where the others have `bits`: 8, as published, unless those are not rounded."""
    if isinstance(bits, int):
        return bits if bits >= EXACT_BITS else 8
    return jnp.where(bits >= EXACT_BITS, bits, 8)
