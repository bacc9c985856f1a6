"""Images as a network takes them, outside of training: for batch statistics, calibration and tests."""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from train.data.resident import ImageSet
from train.steps.state import RANDOM

STATISTICS_BATCHES = 32
"""Training batches over which batch statistics are estimated again for an evaluation."""


def training_batches(
    images: ImageSet, vary: Callable[[Array, Array, Array], tuple[Array, Array]], *, seed: int, limit: int
) -> Iterator[tuple[Array, Array]]:
    """Read the first training batches, varied as in training.

    Statistics of images without the variation are of another distribution than the network learned on, and lower its
    accuracy.

    Args:
      images: The set.
      vary: Variation of each image, as `train.data.resident.make_vary` makes it, compiled.
      seed: Seed of the run, which the variation is drawn from.
      limit: Largest number of batches.
    Yields:
      Network input and labels.
    """
    for i, (x, labels) in enumerate(images.first_batches(limit=limit)):
        key = jax.random.fold_in(jax.random.key(seed, impl=RANDOM), i)
        yield vary(key, jnp.asarray(x), jnp.asarray(labels, jnp.int32))


def in_network_form(images: ImageSet) -> Iterator[tuple[Array, Array]]:
    """Read the test images in order, as network input and labels."""
    normalize = jax.jit(images.normalize)
    return ((normalize(x), jnp.asarray(labels)) for x, labels in images.in_order("test"))


def of_one_shape(batches: Iterable[tuple[Array, Array]]) -> Iterator[tuple[Array, Array]]:
    """Fill up shorter batches to the length of the first, so that one compiled program serves all.

    Args:
      batches: Network input and labels, the first batch the longest.
    Yields:
      Network input, filled up with the first image of its batch, and the labels, as many as images count.
    """
    length = None
    for x, labels in batches:
        length = length or len(x)
        missing = length - len(x)
        yield jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)]) if missing else x, labels
