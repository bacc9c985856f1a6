"""Equalization: channels rescaled so that they share one clip well, the network's function unchanged.

One clip serves all channels of a tensor, and a channel of small range gets few of its levels. Some scales are free:
the function does not depend on them (Nagel et al., Data-free quantization, ICCV 2019, here with the norms in place).

    a kernel and the norm behind it     N(K x) with K / a is N(K x): the norm's statistics are divided by a too
    a norm, a ReLU and a kernel         K s(N(x)) = (K / c) s(c N(x)) for c > 0, since s(c x) = c s(x)

Where each holds is a property of a block, `qpde.models.images.block.Block.scalings`:

    plain                   both, for every kernel and every hidden activation
    symmetric, separate     the second, with K^T behind the ReLU; K itself shrinks with it, and its norm takes that up
    tied, spectral          the first: K^T D s(D K x) fixes the scale of s, and D takes up that of K
    with smoothing          not the second: total variation with eps > 0 does not commute with a scale

Everywhere else the scale is not free: a block's input is also its shortcut, and layers on graphs have no norms.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jaxtyping import Array

from qpde.batches import Batch, read_batches
from qpde.bits import Bits
from qpde.models.images.block import Block
from qpde.models.images.network import Network
from qpde.models.layers import NORM_EPSILON, Quantizer, is_depthwise
from qpde.models.protocol import QuantizedNetwork

__all__ = ["equalize"]


def equalize(model: QuantizedNetwork, variables: Mapping[str, Any], batches: Iterable[Batch]) -> dict:
    """A network of the same function in full precision, whose channels have similar ranges.

    With r the largest |K| of a channel and r_z the largest value of its activation on the data, the free scales are
    a = r, and c = sqrt(r / r_z), after which K / c and c z both have the range sqrt(r r_z).

    Args:
      model: An image network.
      variables: Its collections.
      batches: Images (N, H, W, C), or pairs of these and labels, which are not used. The activations' ranges are read
        from them in full precision.
    Returns:
      `variables` with other kernels and norms. Outputs in evaluation are the same up to float32 rounding.
    Raises:
      ValueError: Not an image network, or no batches.
    """
    if not isinstance(model, Network):
        raise ValueError(
            f"equalization moves a scale from a kernel to the norm behind it, and of {type(model).__name__} it is not "
            "known which norm stands behind which kernel: equalize image networks of qpde.models, and give the kernels "
            "of others a clip for each channel, by per_channel=True"
        )
    variables = unfreeze(dict(variables))
    ranges = None
    for x, _ in read_batches(batches, variables):
        new = _largest_activations(model, variables, jnp.asarray(x))
        ranges = new if ranges is None else jax.tree.map(jnp.maximum, ranges, new)
    if ranges is None:
        raise ValueError("`batches` is empty: the ranges of the activations need at least one batch of images")
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    for stage, name, block, _ in model.stacks:
        new, own = _rescaled(block, params[stage][name], stats[stage][name], ranges[stage][name]["act_clips"])
        params[stage], stats[stage] = params[stage] | {name: new}, stats[stage] | {name: own}
    return {**variables, "params": params, "batch_stats": stats}


@partial(jax.jit, static_argnames="model")
def _largest_activations(model, variables, x):
    def largest(x, clip, quantizer: Quantizer):
        return (None if quantizer.is_weight else x.max(tuple(range(x.ndim - 1)))), clip

    return model.apply(variables, x, bits=Bits(), observe=largest, mutable=["observed"])[1]["observed"]


@partial(jax.jit, static_argnames="block")
def _rescaled(block: Block, params: dict, stats: dict, ranges: list[Array]) -> tuple[dict, dict]:
    """Parameters and statistics of equal blocks with their free scales chosen."""
    return jax.vmap(partial(_rescaled_block, block))(params, stats, ranges)


def _rescaled_block(block, params, stats, ranges):
    params, stats = dict(params), dict(stats)
    for scaling in block.scalings:
        kernel = params[scaling.kernel]
        is_output = scaling.act_index is None
        # Behind an activation stands K itself, by its inputs, or else a kernel whose last axis are the hidden channels:
        # a depthwise one, or the K of K^T.
        axis = 3 if is_output or block.symmetric or is_depthwise(kernel.shape) else 2
        others = tuple(i for i in range(4) if i != axis)
        largest = jnp.abs(kernel).max(others)
        if is_output:
            scale = _positive(largest)
            scale = scale / jnp.exp(jnp.log(scale).mean())  # the kernel keeps its size
        else:
            scale = _positive(jnp.sqrt(largest / ranges[scaling.act_index]))
        params[scaling.kernel] = kernel / jnp.expand_dims(scale, others)
        params[scaling.norm], stats[scaling.norm] = _renormed(
            params[scaling.norm],
            stats[scaling.norm],
            divided_by=scale if is_output or block.symmetric else jnp.ones_like(scale),
            times=jnp.ones_like(scale) if is_output else scale,
        )
    return params, stats


def _renormed(params: dict, stats: dict, *, divided_by: Array, times: Array) -> tuple[dict, dict]:
    """The norm that makes of its divided input what this one makes of its input, times a factor."""
    new_stats = {"mean": stats["mean"] / divided_by}
    gain = params["scale"] * times * divided_by
    if "var" in stats:  # the spectral norm's D is made of gain and kernel alone
        new_stats["var"] = stats["var"] / divided_by**2
        gain = gain * jnp.sqrt((new_stats["var"] + NORM_EPSILON) / (stats["var"] + NORM_EPSILON))
    return {"scale": gain, "bias": params["bias"] * times}, new_stats


def _positive(scale: Array) -> Array:
    """1 for channels that are zero in the kernel or on the data."""
    return jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)
