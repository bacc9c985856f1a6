"""One step of training and one of evaluation, as pure functions of arrays."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from train.losses import classification_sums
from train.state import TrainState

Batch = tuple[UInt8[Array, "n h w c"], Int[Array, " n"]]
Metrics = dict[str, Float[Array, ""]]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    prepare: Callable[[Key[Array, ""], UInt8[Array, "n h w c"]], Float[Array, "n h w c"]],
) -> Callable[[TrainState, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """`train_step(state, batch, key) -> (state, metrics)`: one step down the mean cross entropy's gradient.

    Args:
      model: called as `model.apply(variables, x, train=True, mutable=...)`.
      optimizer: its state is `state.opt_state`.
      prepare: (key, images) -> the model's input: variation and normalisation.
    Returns:
      A pure function.  Its batch is (images, labels), its metrics are those of `classification_sums`.
    """

    def train_step(state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        images, labels = batch
        x = prepare(key, images)

        def mean_loss(params):
            logits, model_state = model.apply(
                {"params": params, **state.model_state}, x, train=True, mutable=list(state.model_state)
            )
            sums = classification_sums(logits, labels)
            return sums["loss"] / sums["count"], (sums, model_state)

        grads, (sums, model_state) = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state={**state.model_state, **model_state},
            opt_state=opt_state,
        )
        return state, sums

    return train_step


def make_epoch_step(train_step, *, steps_per_epoch: int, batch_size: int):
    """`epoch_step(state, totals, images, labels, order) -> (state, totals)`: the epoch's next batch, jitted.

    `state` is donated.  A call returns at once, before the device is done, and costs 2 ms, so the loop over steps is in
    Python; a scan over ten steps of resnet20 took the same time, within noise.

    Args:
      train_step: of `make_train_step`.
      steps_per_epoch: at most (number of images) // batch_size.
      batch_size: images a step.
    """

    def epoch_step(state: TrainState, totals: Metrics, images, labels, order) -> tuple[TrainState, Metrics]:
        step = state.step
        start = step % steps_per_epoch * batch_size
        chosen = jax.lax.dynamic_slice(order, (start,), (batch_size,))
        key = jax.random.fold_in(_keys(state)[1], step)
        state, sums = train_step(state, (images[chosen], labels[chosen]), key)
        return state, _add(totals, sums, step)

    return jax.jit(epoch_step, donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("count", "steps_per_epoch"))
def epoch_order(state: TrainState, *, count: int, steps_per_epoch: int) -> Int[Array, " count"]:
    """The order of the `count` training images in the epoch that `state` stands in.

    The state alone determines it, so a run that goes on after an interruption sees the same batches.
    """
    epoch_key = jax.random.fold_in(_keys(state)[0], state.step // steps_per_epoch)
    return jax.random.permutation(epoch_key, count)


def empty_totals() -> Metrics:
    """Sums before the first batch; "broken_step" is the first step whose loss was not finite, -1 for none."""
    zero = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
    return zero | {"broken_step": jnp.int32(-1)}


def _keys(state: TrainState) -> Key[Array, "2"]:
    """Keys of the orders and of the steps: two streams, so that no epoch shares its key with a step."""
    return jax.random.split(state.key)


def _add(totals: Metrics, sums: Metrics, step) -> Metrics:
    broken = (totals["broken_step"] < 0) & ~jnp.isfinite(sums["loss"])
    added = {name: totals[name] + sums[name] for name in sums}
    return added | {"broken_step": jnp.where(broken, step, totals["broken_step"])}


def make_evaluate(model: nn.Module, normalize) -> Callable[[dict[str, Any], Any, Any], dict[str, float]]:
    """`evaluate(variables, images, labels) -> {"loss", "accuracy"}` over the batches of `stack_batches`."""

    @jax.jit
    def sums_of(variables, images, labels):
        def add(totals, batch):
            logits = model.apply(variables, normalize(batch[0]), train=False)
            return jax.tree.map(jnp.add, totals, classification_sums(logits, batch[1])), None

        zero = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
        return jax.lax.scan(add, zero, (images, labels))[0]

    def evaluate(variables, images, labels):
        sums = jax.device_get(sums_of(variables, images, labels))
        return {
            "loss": float(sums["loss"] / sums["count"]),
            "accuracy": float(sums["correct"] / sums["count"]),
        }

    return evaluate
