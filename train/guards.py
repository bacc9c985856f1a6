"""Guards of training: a step that breaks down changes nothing and is explained; a clip stays positive.

Whether a step broke down is found and acted on inside jit, so nothing waits for the device: from the first step whose
loss, parameters, momenta or statistics are not all finite, state and sums stay as they were before it.  The loop reads
the flag when it is about to save or to log, and the state it then finds is the last good one, standing at the step that
broke; replaying that step tells where.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from train.optimizer import path_name

SMALLEST_CLIP = 1e-3
"""Weights are standardised and activations normalised, so a useful clip is of order 1."""


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no leaf holds NaN or an infinity; integers and random keys never do."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # One reduction over everything: one for each leaf of resnet20 added more than half to the step's compile time.
    return jnp.all(jnp.isfinite(jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in leaves])))


def choose(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """One of two trees of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def hold_clips(params: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """Parameters whose clips are at least `SMALLEST_CLIP`, and how many had to be raised.

    A clip of 0 or less quantizes everything to nothing, and no gradient leads back.  Clips are the leaves whose names
    end in "clips".  One at minus infinity is left as it is: that step broke down, and `all_finite` is to see it.
    """
    fallen = {name: (clip < SMALLEST_CLIP) & jnp.isfinite(clip) for name, clip in clips_of(params).items()}
    count = sum((jnp.sum(f) for f in fallen.values()), start=jnp.int32(0))
    held = jax.tree.map_with_path(
        lambda path, leaf: jnp.where(fallen[path_name(path)], SMALLEST_CLIP, leaf) if _is_clip(path) else leaf, params
    )
    return held, count.astype(jnp.float32)


def clips_of(params: PyTree) -> dict[str, Array]:
    """The clips by path."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params) if _is_clip(path)}


def make_explain(
    model: nn.Module, loss: Callable[..., tuple[Array, Any]], prepare: Callable[..., Array], draw: Callable[..., Any]
) -> Callable[..., str]:
    """`explain(state, batch, key, bits) -> str`: where the step from that state breaks down, and the clips there.

    Args:
      model, prepare, draw: as for `train.step.make_train_step`.   loss: of `train.step.make_loss`.
    """

    @jax.jit
    def probe(state, batch, key, bits):
        x, targets = prepare(key, *batch)
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
    return path_name(path).endswith("clips")
