"""What an own training loop has to know of quantizers: their learning rates, and where their parameters must stay.

labels = {"weights": optax.adamw(1e-3), "clips": optax.adam(1e-2), "smoothing": optax.adam(1e-3)}
optimizer = optax.multi_transform(labels, qpde.optimizer_labels)
...
params = qpde.project(optax.apply_updates(params, updates), model)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["SMALLEST_CLIP", "optimizer_labels", "project"]

SMALLEST_CLIP = 1e-3
"""Below it a quantizer rounds to nothing, and one at 0 or less is not defined."""


def optimizer_labels(params: Any) -> Any:
    """Labels of parameters, for `optax.multi_transform` or `optax.masked`.

    Args:
      params: Parameters, any tree whose leaves have the names of Flax.
    Returns:
      The same tree of labels:
        "clips"      thresholds of quantizers: let them learn faster than weights, and do not decay them
        "smoothing"  sizes of smoothing steps: do not decay them either, since no smoothing is no simpler a network
        "weights"    all else
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _label(_name(path)), params)


def project(params: Any, model: Any = None) -> Any:
    """Parameters in their ranges, for after every step of learning.

    Clips are raised to `SMALLEST_CLIP`. A share of the largest stable smoothing step stays in [0, 1]; a learned gamma2
    in the range that the network gives, since outside of it there is no gradient that would lead back.

    Args:
      params: Parameters, or collections with a "params" inside.
      model: The network, whose `ranges` bound other parameters. Needed for one of `qpde.models` with learned gamma2.
    Returns:
      The same tree; leaves that have no range are untouched. Works under jit.
    Raises:
      ValueError: a gamma2 whose range is not known: give the model.
    """
    ranges: Mapping[str, tuple[float, float]] = {} if model is None else model.ranges

    def projected(path, leaf):
        name = _name(path)
        label = _label(name)
        if label == "clips":
            return jnp.maximum(leaf, jnp.asarray(SMALLEST_CLIP, leaf.dtype))
        if name.endswith("gamma2_share"):
            return jnp.clip(leaf, 0, 1)
        known = [bounds for end, bounds in ranges.items() if name == end or name.endswith(f"/{end}")]
        if known:
            return jnp.clip(leaf, *known[0])
        if label == "smoothing":
            raise ValueError(f"the range of {name!r} belongs to its network: call project(params, model)")
        return leaf

    return jax.tree_util.tree_map_with_path(projected, params)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _label(name: str) -> str:
    if name.endswith("clips"):
        return "clips"
    return "smoothing" if name.endswith(("gamma2", "gamma2_share")) else "weights"
