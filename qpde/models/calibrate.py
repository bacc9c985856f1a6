"""Clips read off data, for a start from a trained net or for the first step of a new one."""

from __future__ import annotations

from typing import Any

import jax

from qpde.bits import Bits
from qpde.models.graph_networks import GraphNetwork
from qpde.models.network import Network

__all__ = ["calibrate_clips"]


def calibrate_clips(
    model: Network | GraphNetwork,
    variables: dict,
    x: Any,
    *,
    method: str = "mse",
    bits: Bits | None = None,
    train: bool = False,
) -> dict:
    """Replace every clip by one that fits the data, block after block, each seeing its predecessors quantized.

    Args:
      model, variables: a network and its collections.   x: (N, H, W, C) images, a few hundred are enough, or a graph.
      method: of `qpde.quantizers.initial_clip`.
      bits: widths that the clips are for; None takes the model's own. An exact part (None) keeps its clips.
      train: normalise by the batch's statistics; for an image net whose running ones are still the starting values.
    Returns:
      `variables` with the new clips in "params".
    """

    @jax.jit
    def read(variables, x):
        return model.apply(variables, x, train=train, bits=bits, calibrate=method, mutable=["clips"])[1]["clips"]

    return {**variables, "params": _replaced(variables["params"], read(variables, x))}


def _replaced(tree: Any, new: Any) -> Any:
    if not isinstance(new, dict):
        return new
    return {**tree, **{k: _replaced(tree[k], v) for k, v in new.items()}}
