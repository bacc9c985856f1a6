"""What training minimises, one row a loss, and counts over batches in which some labels do not count.

Two passes share their weights: "low" at the network's bits, "high" with the same quantized weights and activations
that are clipped, by clips of their own, but not rounded.  With CE the mean cross entropy (Ben-Yair et al., 2022):

    cross_entropy    CE(low)
    distillation     CE(high) + CE(low) + c sim(high, low)
    similarity       c sim(high, low)         no labels: to tune a trained network

    sim = mean over blocks of | softshrink(a_high - a_low, max |a_high| / (2^b - 1)) |^2

where a are a block's outputs for the whole batch, b the bits of activations and the threshold is one step of a
quantizer whose clip is the largest output: differences below it are rounding's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qpde.datasets import IGNORED
from train.config.images import Loss

Terms = dict[str, Float[Array, ""]]
Entropy = Callable[[Array, Array], Float[Array, ""]]


class Outputs(NamedTuple):
    """Results of one pass: logits (N, ..., classes), and the blocks' outputs where the loss needs them."""

    logits: Float[Array, "*batch classes"]
    states: Sequence[Float[Array, "..."]]


@dataclass(frozen=True)
class Row:
    """A loss.

    Attributes:
      formula: (low, high or None, targets, act_bits, config, entropy=None) -> its terms: "loss" and, with a twin,
        "similarity", sim divided by the number of images. CE is entropy(logits, targets), or `cross_entropy`.
      twin: whether it needs the high pass.
      labels: whether it uses the targets.  Without labels the best state is the one of the lowest similarity.
    """

    formula: Callable[..., Terms]
    twin: bool
    labels: bool

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the terms beside "loss"."""
        return ("similarity",) if self.twin else ()


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"], *, smoothing: float = 0.0
) -> Float[Array, ""]:
    """Mean of -sum_k t_k log softmax(logits)_k, with t = (1 - smoothing) targets + smoothing / classes.

    Args:
      logits: before the softmax.
      targets: distributions over the classes, one-hot or mixed.
      smoothing: in [0, 1) (Szegedy et al., 2016).
    """
    return jnp.mean(optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing)))


def similarity(
    high: Sequence[Float[Array, "..."]], low: Sequence[Float[Array, "..."]], act_bits: Array | int
) -> Float[Array, ""]:
    """Mean over blocks of |softshrink(a_high - a_low, max|a_high| / (2^b - 1))|^2, a sum over the batch.

    No gradient flows through the threshold; both passes get one through the difference.
    """
    steps = jnp.exp2(jnp.asarray(act_bits, jnp.float32)) - 1
    terms = []
    for a_high, a_low in zip(high, low, strict=True):
        threshold = jax.lax.stop_gradient(jnp.max(jnp.abs(a_high)) / steps)
        terms.append(jnp.sum(jnp.square(jnp.maximum(jnp.abs(a_high - a_low) - threshold, 0.0))))
    return jnp.mean(jnp.stack(terms))


def _smoothed(config: Loss) -> Entropy:
    return partial(cross_entropy, smoothing=config.label_smoothing)


def _plain(low, high, targets, act_bits, config, entropy=None):
    entropy = entropy or _smoothed(config)
    return {"loss": entropy(low.logits, targets)}


def _distillation(low, high, targets, act_bits, config, entropy=None):
    entropy = entropy or _smoothed(config)
    alike = similarity(high.states, low.states, act_bits)
    entropies = [entropy(pass_.logits, targets) for pass_ in (high, low)]
    return {"loss": sum(entropies) + config.similarity_weight * alike, "similarity": alike / len(low.logits)}


def _similarity(low, high, targets, act_bits, config, entropy=None):
    alike = similarity(high.states, low.states, act_bits)
    return {"loss": config.similarity_weight * alike, "similarity": alike / len(low.logits)}


LOSSES = {
    "cross_entropy": Row(_plain, twin=False, labels=True),
    "distillation": Row(_distillation, twin=True, labels=True),
    "similarity": Row(_similarity, twin=True, labels=False),
}


def classification_sums(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> dict[str, Float[Array, ""]]:
    """Sums over the examples whose label is not `IGNORED`, so that batches of any filling can be added.

    Args:
      logits: (N, classes), or (N, H, W, classes) for every pixel, before the softmax.
      labels: (N,), or (N, H, W), in 0..classes-1 or `IGNORED`.
    Returns:
      Scalars: "loss", the sum of -log softmax(logits)[label]; "correct", how many labels have the largest
      logit; "count", how many examples there are.
    """
    counts = labels != IGNORED
    chosen = jnp.maximum(labels, 0)[..., None]
    # optax.softmax_cross_entropy_with_integer_labels differs in the last digit: it subtracts in another order.
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == labels  # never where the label is IGNORED, which is no index
    return {
        "loss": jnp.sum(jnp.where(counts, losses, 0.0)),
        "correct": jnp.sum(correct.astype(jnp.float32)),
        "count": jnp.sum(counts.astype(jnp.float32)),
    }
