"""Lipschitz constants of a network's steps, and the errors that rounding injects into them."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from qpde import quantizers, stencils
from qpde.bits import Bits
from qpde.certify.kernel_norms import conv_norm_bound, conv_norm_is_at_most, depthwise_norm_bound
from qpde.models.images.blocks import Block, InvertedBlock, StableBlock, is_depthwise
from qpde.models.images.network import Network

__all__ = [
    "StepBound",
    "at_block",
    "check_model",
    "in_float64",
    "rounded",
    "step_bound",
    "step_bounds",
    "step_lipschitz",
    "to_float64",
]


def step_lipschitz(
    norm: Float[ArrayLike, "*#layers"],
    second_norm: Float[ArrayLike, "*#layers"] | None = None,
    *,
    step_size: int | Float[ArrayLike, "*#layers"],
) -> Float[Array, "*layers"]:
    """Lipschitz constant, in the 2-norm, of a step with a nondecreasing, 1-Lipschitz s (ReLU, clip, tanh).

    Symmetric, x - h K^T s(K x + b): max(1, h |K|^2 - 1), so 1, non-expansive, up to h |K|^2 = 2.
    Plain, x - h K2 s(K1 x + b): 1 + h |K1| |K2|.

    Norm layers belong into the maps: K is D K for a tied norm of scale D. Unless that norm is tied the step
    is plain.

    Args:
      norm: |K|, or |K1|; for all layers or one per layer. An estimate from below needs a margin.
      second_norm: |K2| of a plain step, alike; None for the symmetric step.
      step_size: h >= 0, alike.
    Returns:
      The constant of each layer, never below 1. A sequence of steps has at most their product.
    """
    norm, h = jnp.asarray(norm), jnp.asarray(step_size, jnp.float32)
    if second_norm is None:
        return jnp.maximum(1.0, h * norm**2 - 1.0)
    return 1.0 + h * norm * jnp.asarray(second_norm)


class StepBound(NamedTuple):
    """Of one step, for one image size.

    Attributes:
      lipschitz: of the twin's step, in the 2-norm.   injected: a bound of the error of rounding, for every input.
    """

    lipschitz: float
    injected: float


def step_bounds(model: Network, variables: dict, size: tuple[int, int], bits: Bits) -> list[StepBound]:
    """Constants of every step, for images of that size; on the host, once for a network.

    Args:
      model, variables, bits: as for `certify`.   size: height and width of the images.
    Returns:
      One `StepBound` a block, in order.
    Raises:
      ValueError: as `certify`, for the network.
    """
    check_model(model)
    found = []
    bits = model.checked_bits(bits)
    for index, (block, own, step_size, _) in enumerate(model.steps(variables)):
        found.append(step_bound(block, own, step_size, at_block(bits, index), size))
        size = block.output_size(*size)
    return found


def step_bound(block: Block, variables: dict, step_size: Any, bits: Bits, size: tuple[int, int]) -> StepBound:
    """The table of the module's docstring, and the rounding errors of the quantizers carried through one step.

    `first` and `second` bound |Q_1(x) - clip(x)| and |Q_2(z) - clip(z)|. With L' the constant of xc -> xc - h f(xc),
    rounding the shortcut as well gives L' first + h |B| second for the branch h B s(A x) of the step.

    Args:
      block, variables, step_size: of `Network.steps`.   bits: scalars, activations not None.
      size: height and width of the step's input.
    Raises:
      ValueError: the block smooths by a kind that is not convex.
    """
    if block.smoothing is not None and not stencils.KINDS[block.smoothing.kind].convex:
        convex = ", ".join(name for name, kind in stencils.KINDS.items() if kind.convex)
        raise ValueError(
            f"smoothing of kind {block.smoothing.kind!r} can amplify a difference, so no constant of its step is "
            f"proven: certify networks that smooth by a convex kind ({convex})"
        )
    with_rounded = rounded(block, variables, step_size, bits)
    with in_float64():
        kernels, scales, h = jax.tree.map(np.asarray, _factors(block, with_rounded, step_size))
    clips = np.asarray(variables["params"]["act_clips"])
    radii = [_rounding(clip, bits.activations, block, i) for i, clip in enumerate(clips)]
    pixels = math.prod(size)
    first = radii[0] * math.sqrt(pixels * block.width_in)
    keeps_rounding = block.residual == "rounded"
    if block.symmetric:
        forward, back, step, hidden = _symmetric_norms(block, kernels, scales, float(h), size)
        second = radii[1] * math.sqrt(hidden)
        branch = h * back * (forward * first + second)
        lipschitz = step
        injected = min(branch + first, step * first + h * back * second) if keeps_rounding else branch
    elif isinstance(block, InvertedBlock):
        norms = [_scaled_norm(block, kernels[f"kernel{i}"], scales[f"norm{i}"]) for i in (1, 2, 3)]
        hidden = (pixels * block.hidden, math.prod(block.output_size(*size)) * block.hidden)
        shortcut = 1.0 if block.stride == 1 and block.width_in == block.width_out else 0.0
        lipschitz = shortcut + math.prod(norms)
        error = first
        for norm, radius, numbers in zip(norms, radii[1:], hidden, strict=False):
            error = norm * error + radius * math.sqrt(numbers)
        injected = norms[2] * error + (shortcut * first if keeps_rounding else 0.0)
    else:
        norms = [_scaled_norm(block, kernels[f"kernel{i}"], scales[f"norm{i}"]) for i in (1, 2)]
        out = size if isinstance(block, StableBlock) else block.output_size(*size)
        shortcut = 1.0
        if block.has_projection:
            shortcut = _scaled_norm(block, kernels["shortcut_kernel"], scales["shortcut_norm"])
        lipschitz = shortcut + norms[0] * norms[1]
        second = radii[1] * math.sqrt(math.prod(out) * kernels["kernel1"].shape[-1])
        injected = norms[1] * (norms[0] * first + second) + (shortcut * first if keeps_rounding else 0.0)
    if isinstance(block, StableBlock):
        if block.width_out > block.width_in:
            lipschitz = math.hypot(lipschitz, 1.0)
            injected = math.hypot(injected, first if keeps_rounding else 0.0)
        if block.stride == 2:
            lipschitz, injected = lipschitz / 2, injected / 2
    return StepBound(lipschitz, injected)


def check_model(model):
    if model.clip_bits is not None:
        raise ValueError(
            f"the twin of a network with clips for each of {model.clip_bits} clips elsewhere, which no bound covers: "
            "certify `model.at_bits(variables, bits)`"
        )
    if model.compute_dtype != "float32":
        raise ValueError(
            f"a network that computes in {model.compute_dtype} rounds more than activations, which no bound covers: "
            "certify `model.clone(compute_dtype='float32')`"
        )


@partial(jax.jit, static_argnames=("block", "step_size"))
def _factors(block, rounded, step_size):
    return block.factors(to_float64(rounded), step_size, Bits())


@partial(jax.jit, static_argnames=("block", "step_size"))
def rounded(block, variables, step_size, bits):
    """The variables of a step with its kernels as they are rounded, in float32 as in a run."""
    kernels, _, _ = block.factors(variables, step_size, bits)
    return {**variables, "params": variables["params"] | kernels}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within, arrays can be float64, and accelerators do not round the factors of products."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def to_float64(tree):
    return jax.tree.map(lambda v: v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)


def _symmetric_norms(block, kernels, scales, h, size):
    """Bounds of |D1 K| and |D2 K^T|, the constant of xc - h D2 K^T s(D1 K xc), and the hidden numbers of an image."""
    kernel, padding, hidden = kernels["kernel1"], None, math.prod(size) * kernels["kernel1"].shape[-1]
    if isinstance(block, InvertedBlock):
        kernel, padding = np.einsum("abc,ic->abic", kernels["kernel2"][:, :, 0], kernel[0, 0]), 0
        hidden = (size[0] - 2) * (size[1] - 2) * kernel.shape[-1]
    forward = conv_norm_bound(kernel * scales["norm1"])
    if block.norm == "separate":
        back = conv_norm_bound(kernel * scales["norm2"][:, None])
        return forward, back, 1 + h * forward * back, hidden
    limit = math.sqrt(2 / h)
    if forward > limit and conv_norm_is_at_most(kernel * scales["norm1"], limit, size, padding=padding):
        forward = limit
    # Smoothing between s and K^T, itself non-expansive, leaves no gradient step.
    step = 1 + h * forward**2 if block.smoothing is not None else max(1.0, h * forward**2 - 1)
    return forward, forward, step, hidden


def _scaled_norm(block, kernel, scale) -> float:
    depthwise = isinstance(block, InvertedBlock) and is_depthwise(kernel.shape)
    return (depthwise_norm_bound if depthwise else conv_norm_bound)(kernel * scale)


def _rounding(clip, bits, block: Block, index) -> float:
    """The largest |Q(v) - clip(v)|: half a step, or half the widest gap of a level set."""
    if bits >= 16:
        return 0.0
    signed = index == 0 and block.signed_inputs
    if block.levels == "uniform":
        return float(quantizers.quantization_step(float(clip), bits, signed=signed)) / 2
    v = np.linspace(0, 1, 1 << 14, dtype=np.float32)
    rounded = quantizers.quantize_activation(v, 1.0, bits, levels=block.levels, signed=signed)
    return float(clip) * float(np.abs(np.asarray(rounded) - v).max() + v[1])


def at_block(bits, index):
    """The widths of one step."""
    return Bits(*(v if v is None or np.ndim(v) == 0 else v[index] for v in bits))
