"""Which images a step takes: the order of an epoch, and the batch that the state stands at."""

import functools

import jax
from jaxtyping import Array, Int, Key

from train.steps.state import TrainState

__all__ = ["epoch_order", "make_select", "select_given"]


def make_select(*, steps_per_epoch: int, batch_size: int):
    """`select(state, images, labels, order) -> (batch, key)`: of the step that the state stands at.

    Args:
      steps_per_epoch: at most (number of images) // batch_size.
      batch_size: images a step.
    """

    def select(state: TrainState, images, labels, order):
        start = state.step % steps_per_epoch * batch_size
        chosen = jax.lax.dynamic_slice(order, (start,), (batch_size,))
        return (images[chosen], labels[chosen]), jax.random.fold_in(_keys(state)[1], state.step)

    return select


def select_given(state: TrainState, images, labels):
    """The `select` of batches that are handed over one by one, and its key."""
    return (images, labels), jax.random.fold_in(_keys(state)[1], state.step)


@functools.partial(jax.jit, static_argnames=("count", "steps_per_epoch"))
def epoch_order(state: TrainState, *, count: int, steps_per_epoch: int) -> Int[Array, " count"]:
    """The order of the `count` training images in the epoch that `state` stands in.

    The state alone determines it, so a run that goes on after an interruption sees the same batches.
    """
    epoch_key = jax.random.fold_in(_keys(state)[0], state.step // steps_per_epoch)
    return jax.random.permutation(epoch_key, count)


def _keys(state: TrainState) -> Key[Array, "2"]:
    """Keys of the orders and of the steps: two streams, so that no epoch shares its key with a step."""
    return jax.random.split(state.key)
