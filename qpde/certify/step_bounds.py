"""Lipschitz constants of a network's steps, and the errors that rounding injects into them."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from qpde.bits import Bits
from qpde.models.images.block import Block
from qpde.models.images.network import BoundPart, Network
from qpde.models.images.parts import Factors, Head, Part, StepBound
from qpde.models.images.segmentation import SegmentationNetwork

__all__ = [
    "StepBound",
    "StepBounds",
    "check_model",
    "exact_factors",
    "in_float64",
    "rounded",
    "rounded_link",
    "rounded_parts",
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


@dataclasses.dataclass(frozen=True)
class StepBounds:
    """Constants of all steps of one network with its variables, at one image size and one choice of bits.

    Attributes:
      bounds: One `StepBound` a block, in order.
      proven_for: What they are constants of: network, size, bits, and a digest of the variables.
      local: Of a network with a class for every pixel, the norms of the single taps by block, see `Block.spread`; None
        for a block that smooths.
      parts: Of an image network, `rounded_parts`.
      tail: Of an image network with one answer for each input, the Lipschitz constant from the last block's output to
        what the dense layer takes.
    """

    bounds: tuple[StepBound, ...]
    proven_for: tuple[Any, tuple[int, ...], str, str]
    local: tuple[dict[str, np.ndarray] | None, ...] = ()
    parts: tuple[tuple[dict, Any], ...] = ()
    tail: float = math.nan

    def check(self, model: Any, variables: Mapping[str, Any], size: tuple[int, ...], bits: Bits) -> None:
        """ValueError where these are constants of something else than what is given; names it."""
        needed = _proven_for(model, variables, size, bits)
        for what, found, wanted in zip(
            ("network", "image size", "bits", "variables"), self.proven_for, needed, strict=True
        ):
            if found != wanted:
                shown = f" ({found}, not {wanted})" if what in ("image size", "bits") else ""
                raise ValueError(
                    f"`steps` are constants of another {what}{shown}, which prove nothing here: compute them by "
                    "qpde.certify.step_bounds for exactly what you certify, or leave them out"
                )


def step_bounds(model: Any, variables: Mapping[str, Any], size: tuple[int, ...], bits: Bits) -> StepBounds:
    """Constants of every step, for images of that size; on the host, once for a network.

    Args:
      model: As for `certify`.
      variables: As for `certify`.
      size: Height and width of the images; of a chain, the shape of one input.
      bits: As for `certify`.
    Raises:
      ValueError: As `certify`, for the network.
    """
    if hasattr(model, "links"):
        return StepBounds(tuple(_link_bounds(model, variables, size, bits)), _proven_for(model, variables, size, bits))
    check_model(model)
    bits = model.checked_bits(bits)
    found: list[StepBound] = []
    local: list[dict[str, np.ndarray] | None] = []
    channels = variables["params"]["stem"]["kernel"].shape[2]
    sizes = [own for _, _, own in model.sized_parts((*size, channels))]
    parts, tail = rounded_parts(model, variables, bits), 1.0
    of_pixels, behind = isinstance(model, SegmentationNetwork), len(model.stem_parts()) + len(model.blocks)
    for i, bound in enumerate(model.bound_parts(variables, bits)):
        (own, _), map_size = parts[i], sizes[i]
        if isinstance(bound.part, Block):
            factors = _exact(bound, own)
            found.append(bound.part.step_bound(factors, bound.bits, map_size))
            if of_pixels:
                local.append(None if bound.part.smoothing else bound.part.local_norms(factors))
        elif i >= behind and not of_pixels:
            factors = _exact(bound, own)
            if isinstance(bound.part, Head):
                tail *= bound.part.feature_gain(factors, map_size)
            else:
                tail *= bound.part.step_bound(factors, Bits(), map_size).lipschitz
    proven_for = _proven_for(model, variables, size, bits)
    return StepBounds(tuple(found), proven_for, tuple(local), parts, math.nan if of_pixels else tail)


def rounded_parts(model: Network, variables: Mapping[str, Any], bits: Bits) -> tuple[tuple[dict, Any], ...]:
    """Of every part its variables, the kernels as they are rounded in float32, and gamma2.

    Args:
      model: The network.
      variables: Its collections.
      bits: Its bits.
    """
    return tuple(
        (rounded(part, own, step_size, widths), gamma2)
        for part, own, step_size, gamma2, widths in model.bound_parts(variables, bits)
    )


def _link_bounds(model, variables, size, bits):
    """Constants of every part of a chain."""
    shape = jax.ShapeDtypeStruct((1, *size), jnp.float32)
    for link, own, own_bits in model.links(variables, shape, bits):
        scalars = Bits(*(None if v is None else int(v) for v in own_bits))
        rounded = rounded_link(link, own, own_bits)
        with in_float64():
            factors = jax.tree.map(np.asarray, _link_factors(link, rounded))
        yield link.bound(factors, scalars, shape.shape[1:])
        shape = jax.eval_shape(partial(link.run, bits=own_bits), own, shape)


@partial(jax.jit, static_argnames="link")
def rounded_link(link: Any, variables: Any, bits: Bits) -> Any:
    """The variables of a part of a chain with its kernels as they are rounded, in float32 as in a run."""
    return link.rounded(variables, bits)


@partial(jax.jit, static_argnames="link")
def _link_factors(link, rounded):
    return link.factors(to_float64(rounded))


def step_bound(bound: BoundPart, size: tuple[int, int]) -> StepBound:
    """Lipschitz constant of one block of the twin, and the error of its quantizers carried through the block.

    Args:
      bound: A block of `Network.bound_parts`, with bits for its activations.
      size: Height and width of its input.
    Raises:
      ValueError: The block smooths by a kind that is not convex.
    """
    return bound.part.step_bound(exact_factors(bound), bound.bits, size)


def exact_factors(bound: BoundPart) -> Factors:
    """What a part multiplies by, in float64, its kernels as they are rounded in float32."""
    return _exact(bound, rounded(bound.part, bound.variables, bound.step_size, bound.bits))


def _exact(bound: BoundPart, own: dict) -> Factors:
    """`exact_factors`, from the variables with rounded kernels."""
    with in_float64():
        kernels, scales, step_size = jax.tree.map(np.asarray, _factors(bound.part, own, bound.step_size))
    return Factors(kernels, scales, step_size, np.asarray(bound.variables["params"].get("act_clips", ())))


def _proven_for(model, variables, size, bits):
    digest = hashlib.sha256()
    collections = {k: v for k, v in unfreeze(variables).items() if k != "observed"}
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(collections), key=lambda pair: str(pair[0])):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    values = [None if part is None else np.asarray(part).tolist() for part in bits]
    return model, tuple(int(n) for n in size), f"W{values[0]}A{values[1]}", digest.hexdigest()


def check_model(model: Any) -> None:
    """Raise ValueError for a network that no bound covers."""
    if not isinstance(model, Network):
        raise ValueError(
            f"no Lipschitz constants are proven of {type(model).__name__}: certify image networks of qpde.models, or a "
            "qpde.nn.Chain in qpde.quantized. Without constants, qpde.measure.compare measures agreement on your data"
        )
    if model.clip_bits is not None:
        raise ValueError(
            f"the twin of a network with clips for each of {model.clip_bits} clips elsewhere, which no bound covers: "
            "certify `model.at_bits(variables, bits)`"
        )
    if model.options.compute_dtype != "float32":
        raise ValueError(
            f"a network that computes in {model.options.compute_dtype} rounds more than activations, which no bound "
            "covers: certify `model.with_options(compute_dtype='float32')`"
        )


@partial(jax.jit, static_argnames=("part", "step_size"))
def _factors(part, rounded, step_size):
    return part.factors(to_float64(rounded), step_size, Bits())


def rounded(part: Part, variables: dict, step_size: Any, bits: Bits) -> dict:
    """The variables of a part with its kernels as they are rounded, in float32 as in a run."""
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors of products to fewer bits
        return _rounded(part, variables, step_size, bits)


@partial(jax.jit, static_argnames=("part", "step_size"))
def _rounded(part, variables, step_size, bits):
    kernels, _, _ = part.factors(variables, step_size, bits)
    return {**variables, "params": variables["params"] | kernels}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within, arrays can be float64, and accelerators do not round the factors of products."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def to_float64(tree):
    """A tree with its floating leaves in float64."""
    return jax.tree.map(lambda v: v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)
