"""Guards of training: a step that breaks down changes nothing and is explained; parameters stay in their ranges.

Whether a step broke down is found and acted on inside jit, so nothing waits for the device: from the first step whose
loss, parameters, momenta or statistics are not all finite, state and sums stay as they were before it.  The loop reads
the flag when it is about to save or to log, and the state it then finds is the last good one, standing at the step that
broke; replaying that step tells where.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from train.steps.paths import path_name

SMALLEST_CLIP = 1e-3
"""Weights are standardised and activations normalised, so a useful clip is of order 1. One of 0 or less quantizes
everything to nothing, and no gradient leads back."""

CLIPS = "clips"
"""What the paths of clips end in."""

Ranges = Mapping[str, tuple[float, float]]
"""(lowest, largest) by the end of a parameter's path, as `qpde.models.images.network.Network.ranges` gives them."""


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no leaf holds NaN or an infinity; integers and random keys never do."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # One reduction over everything: one for each leaf of resnet20 added more than half to the step's compile time.
    return jnp.all(jnp.isfinite(jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in leaves])))


def choose(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """One of two trees of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def hold(params: PyTree, ranges: Ranges) -> tuple[PyTree, Float[Array, ""]]:
    """Parameters projected onto their ranges, and how many clips had to be raised.

    What is not finite is left as it is: that step broke down, and `all_finite` is to see it.

    Args:
      params: the clips among them have to be at least `SMALLEST_CLIP`.
      ranges: Ranges of others.
    """
    ranges = {CLIPS: (SMALLEST_CLIP, math.inf)} | dict(ranges)

    def held(path, leaf):
        limits = next((limits for end, limits in ranges.items() if path_name(path).endswith(end)), None)
        return leaf if limits is None else jnp.where(jnp.isfinite(leaf), jnp.clip(leaf, *limits), leaf)

    new = jax.tree.map_with_path(held, params)
    before = clips_of(params)
    raised = (jnp.sum((clip > before[name]).astype(jnp.float32)) for name, clip in clips_of(new).items())
    return new, sum(raised, start=jnp.float32(0))


def clips_of(params: PyTree) -> dict[str, Array]:
    """The clips by path."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params) if _is_clip(path)}


def make_explain(
    model: Any,
    loss: Callable[..., tuple[Array, Any]],
    inputs: Callable[..., Array],
    draw: Callable[..., Any],
) -> Callable[..., str]:
    """`explain(state, batch, key, bits) -> str`: where the step from that state breaks down, and the clips there.

    Args:
      model: The network.
      loss: Result of `train.steps.train_step.make_loss`.
      inputs: See `train.steps.train_step.make_train_step`.
      draw: See there.
    """

    @jax.jit
    def probe(state, batch, key, bits):
        x, targets, _ = inputs(key, *batch)
        bits = draw(key, bits)
        (logits, states), _ = model.apply(
            state.variables, x, train=True, bits=bits, return_states=True, mutable=list(state.model_state)
        )
        grads, _ = jax.grad(loss, has_aux=True)(state.params, state.model_state, x, targets, bits)
        return [all_finite(value) for value in (x, *states, logits)], jax.tree.map(all_finite, grads)

    def explain(state, batch, key, bits):
        forward, grads = jax.device_get(probe(state, batch, key, bits))
        clips = "; ".join(
            f"{name} {np.array2string(np.asarray(leaf), precision=3)}" for name, leaf in clips_of(state.params).items()
        )
        clips = f"; clips before it: {' '.join(clips.split())}" if clips else ""
        names = ["the images", *(f"the output of block {i}" for i in range(len(forward) - 2)), "the logits"]
        for name, finite in zip(names, forward, strict=True):
            if not finite:
                return f"{name} (first in the order of the network) not finite{clips}"
        # Gradients run from the head to the opening, so of the stages that broke the last one broke first.
        broken = [path_name(path) for path, finite in jax.tree.leaves_with_path(grads) if not finite]
        if broken:
            return f"the gradient of {max(broken)} not finite, as {len(broken)} in all, while the logits are{clips}"
        return f"the new parameters or statistics not finite, while the gradients are{clips}"

    return explain


def _is_clip(path) -> bool:
    return path_name(path).endswith(CLIPS)
