"""Clips read off one batch, for the first step of a new net, and converged norms, for the last of a trained one.

`qpde.ptq` quantizes a net that was trained in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze

from qpde import quantizers
from qpde.batches import Batch, read_batch
from qpde.bits import Bits

__all__ = ["calibrate_clips", "converge_norms", "replace_clips"]


def calibrate_clips(
    model: Any,
    variables: Mapping[str, Any],
    x: Batch,
    *,
    method: str = "mse",
    bits: Bits | None = None,
    train: bool = False,
) -> dict:
    """Replace every clip by one that fits the data, block after block, each seeing its predecessors quantized.

    Args:
      model: Network, see `qpde.models.QuantizedNetwork`.
      variables: Its collections. One of `qpde.quantized` takes those of the module itself too.
      x: (N, ...) inputs such as images, a few hundred are enough, or a graph; or a pair of these and labels, which are
        not used.
      method: Method of `qpde.quantizers.initial_clip`. On graphs the maximum ("absmax") is good at 8 bits and the
        99.9th percentile at 4; the clips that a network is made with fit no graph.
      bits: Bits that the clips are for; None takes the model's own. An exact part (None) keeps its clips. Where
        widths have clips of their own, those of each are found at that width, whatever the number given.
      train: Normalise by the batch's statistics; for an image net whose running ones are still the starting values.
    Returns:
      `variables` with the new clips in "params".
    Raises:
      ValueError: no data, or a batch of another form.
    """
    new = unfreeze(dict(variables))
    x = read_batch(x, new)
    bits = model.bits if bits is None else bits
    if hasattr(model, "adopt"):
        new = model.adopt(new, x)
    clip_bits = getattr(model, "clip_bits", None)
    if clip_bits is None or bits is None:
        return replace_clips(new, _fitting_clips(model, new, x, bits, method=method, train=train))
    for row, width in enumerate(clip_bits):
        widths = Bits(*(None if part is None else width for part in bits))
        found = _fitting_clips(model, new, x, widths, method=method, train=train)
        new = replace_clips(new, found, row=row)
    return new


@partial(jax.jit, static_argnames=("model", "method", "train"))
def _fitting_clips(model, variables, x, bits, *, method, train):
    def choose(x, clip, quantizer):
        if quantizer.bits is not None:
            clip = quantizers.initial_clip(
                x,
                quantizer.bits,
                signed=quantizer.signed,
                method=method,
                per_channel=clip.ndim == 1,
                levels=quantizer.levels,
            )
        return clip, clip

    mutable = ["observed", "batch_stats"]  # a norm of flax insists on updating its statistics in training
    return model.apply(variables, x, train=train, bits=bits, observe=choose, mutable=mutable)[1]["observed"]


def converge_norms(model: Any, variables: Mapping[str, Any], x: Batch, *, bits: Bits | None = None) -> dict:
    """Bring the spectral norms of tied and spectral steps to convergence, for the kernels as they are rounded.

    In training one iteration a step follows the kernels; what remains, a few per cent, is within the margin of the step
    size or not. Do so before a network is exported or certified.

    Args:
      model: Network.
      variables: Its collections.
      x: Any images of the size it runs on, or a pair of these and labels.
      bits: Bits that it runs at; None takes the model's own.
    Returns:
      `variables` with other singular vectors in "spectral"; the same ones if there are none.
    """
    variables = unfreeze(dict(variables))
    if "spectral" not in variables:
        return variables
    x = read_batch(x, variables)
    return {**variables, "spectral": _converged(model, variables, x, model.bits if bits is None else bits)}


@partial(jax.jit, static_argnames="model")
def _converged(model, variables, x, bits):
    return model.apply(variables, x, bits=bits, power_iterations=200, mutable=["spectral"])[1]["spectral"]


def replace_clips(variables: Mapping[str, Any], observed: dict, *, row: int | None = None) -> dict:
    """Variables with new clips.

    Args:
      variables: Variables of a network.
      observed: Collection "observed" whose records are clips, single ones or lists; where they are None, or left out,
        the old ones stay.
      row: Row of the clips that a network has for each width; None for one that has the same for all.
    Returns:
      `variables`, the records packed as `weight_clips` and `act_clips` of its "params".
    """

    def packed(records):
        """Records ((blocks,) or (blocks, C) each) one after another on the second axis."""
        return jnp.concatenate([r.reshape(len(r), -1) for r in records], axis=1)

    def replaced(tree, new):
        if isinstance(new, dict):
            return {**tree, **{k: replaced(tree[k], v) for k, v in new.items()}}
        if not isinstance(new, list | tuple):
            # The largest, where nn.scan or nn.vmap ran a layer several times with the same parameters.
            return tree if new is None else new.max(tuple(range(new.ndim - tree.ndim)))
        if any(record is None for record in new):
            return tree
        return packed(new) if row is None else tree.at[:, row].set(packed(new))

    variables = unfreeze(dict(variables))
    return {**variables, "params": replaced(variables["params"], observed)}
