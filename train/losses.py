"""Losses and counts over batches in which some labels do not count."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -1
"""The label of an example that is not there: padding of the last batch of an evaluation."""


def classification_sums(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> dict[str, Float[Array, ""]]:
    """Sums over the examples whose label is not `IGNORED`, so that batches of any filling can be added.

    Args:
      logits: (N, classes), before the softmax.
      labels: (N,), in 0..classes-1 or `IGNORED`.
    Returns:
      Scalars: "loss", the sum of -log softmax(logits)[label]; "correct", how many labels have the largest
      logit; "count", how many examples there are.
    """
    counts = labels != IGNORED
    chosen = jnp.maximum(labels, 0)[:, None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[:, 0]
    correct = jnp.argmax(logits, axis=-1) == labels  # never where the label is IGNORED, which is no index
    return {
        "loss": jnp.sum(jnp.where(counts, losses, 0.0)),
        "correct": jnp.sum(correct.astype(jnp.float32)),
        "count": jnp.sum(counts.astype(jnp.float32)),
    }
