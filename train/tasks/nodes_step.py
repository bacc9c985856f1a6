"""Steps on the whole graph as pure functions: several epochs of one seed in a scan, many seeds in one call."""

from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import jraph
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from qpde.bits import Bits
from qpde.graphs import dirichlet_energy
from qpde.models import QuantizedNetwork, calibrate_clips
from train.steps.losses import classification_sums


class Task(NamedTuple):
    """A graph with the labels of each split, `qpde.datasets.IGNORED` at all other nodes."""

    graph: jraph.GraphsTuple
    train: Int[Array, " nodes"]
    validation: Int[Array, " nodes"]
    test: Int[Array, " nodes"]


class NodeState(flax.struct.PyTreeNode):
    """One seed's training; many seeds have a leading axis on every leaf.

    Attributes:
      epoch: () int32, steps done.
      params, opt_state: after them.
      key: constant; each epoch derives its own from it.
      best_params: those of the epoch with the highest validation accuracy, of equals the one with the lowest loss.
      best_accuracy, best_loss, best_epoch: of that epoch.
    """

    epoch: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    best_params: PyTree
    best_accuracy: Float[Array, ""]
    best_loss: Float[Array, ""]
    best_epoch: Int[Array, ""]


# Many seeds: the same functions over a leading axis, `at_once` seeds vmapped and the rest after them, in one call.


@partial(jax.jit, static_argnames=("model", "methods", "at_once"))
def init_seeds(
    model: QuantizedNetwork, keys: Key[Array, " seeds"], task: Task, bits: Bits, *, methods: Bits, at_once: int
) -> PyTree:
    """Random parameters of each seed, with clips that fit them where `bits` quantizes (see `calibrate_seeds`)."""

    def init(key):
        return _calibrated(model, model.init(key, task.graph)["params"], task, bits, methods)

    return jax.lax.map(init, keys, batch_size=at_once)


@partial(jax.jit, static_argnames=("model", "methods", "at_once"))
def calibrate_seeds(
    model: QuantizedNetwork, params: PyTree, task: Task, bits: Bits, *, methods: Bits, at_once: int
) -> PyTree:
    """The parameters with the clips that `methods` reads off kernels and activations, where `bits` quantizes."""
    return jax.lax.map(lambda p: _calibrated(model, p, task, bits, methods), params, batch_size=at_once)


@partial(jax.jit, static_argnames=("model", "optimizer", "at_once"))
def start_seeds(
    model: QuantizedNetwork,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    keys: Key[Array, " seeds"],
    task: Task,
    bits: Any,
    *,
    at_once: int,
) -> NodeState:
    """`first_state` of each seed."""

    def start(values):
        own_params, key = values
        return first_state(model, optimizer, own_params, key, task, bits)

    return jax.lax.map(start, (params, keys), batch_size=at_once)


@partial(jax.jit, static_argnames=("model", "optimizer", "epochs", "at_once"), donate_argnames="states")
def train_seeds(
    model: QuantizedNetwork,
    optimizer: optax.GradientTransformation,
    states: NodeState,
    task: Task,
    bits: Any,
    *,
    epochs: int,
    at_once: int,
) -> tuple[NodeState, dict[str, Float[Array, "seeds epochs"]]]:
    """`train_epochs` of each seed. `states` is donated."""

    def train(state):
        return train_epochs(model, optimizer, state, task, bits, epochs=epochs)

    return jax.lax.map(train, states, batch_size=at_once)


@partial(jax.jit, static_argnames=("model", "at_once"))
def test_seeds(
    model: QuantizedNetwork, params: PyTree, task: Task, *, at_once: int
) -> tuple[Float[Array, " seeds"], Float[Array, "seeds layers"]]:
    """Accuracy on the test nodes in full precision, and the relative Dirichlet energy |G x|^2 / 2 |x|^2 of each state.

    The energy is that of the "normalized" gradient and at most 1; it is 0 where neighbours cannot be told apart.
    """

    def test(params):
        logits, states = model.apply({"params": params}, task.graph, return_states=True)
        sums = classification_sums(logits, task.test)
        squares = [jnp.maximum(jnp.sum(jnp.square(x)), jnp.finfo(x.dtype).tiny) for x in states]
        energy = [dirichlet_energy(task.graph, x) / square for x, square in zip(states, squares, strict=True)]
        return sums["correct"] / sums["count"], jnp.stack(energy)

    return jax.lax.map(test, params, batch_size=at_once)


# One seed.


def first_state(
    model: QuantizedNetwork,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    key: Key[Array, ""],
    task: Task,
    bits: Any,
) -> NodeState:
    """Training that starts at `params`, which are the best so far."""
    accuracy, loss = _validate(model, params, task, bits)
    epoch = jnp.int32(0)
    return NodeState(epoch, params, optimizer.init(params), key, params, accuracy, loss, epoch)


def train_epochs(
    model: Any,
    optimizer: optax.GradientTransformation,
    state: NodeState,
    task: Task,
    bits: Any,
    *,
    epochs: int,
) -> tuple[NodeState, dict[str, Float[Array, " epochs"]]]:
    """That many steps down the mean cross entropy of the training nodes, each with its own dropout.

    Args:
      model: called as `model.apply({"params": params}, graph, train=..., bits=..., rngs=...)`.
      optimizer: its state is `state.opt_state`.
      state: State of one seed.
      task: the graph.
      bits: `qpde.Bits`, traced or not, or None for the model's own.
      epochs: static.
    Returns:
      The state after them and, per epoch, "train_loss", "validation_loss" and "validation_accuracy".
    """

    def epoch(state, _):
        def mean_loss(params):
            key = jax.random.fold_in(state.key, state.epoch)
            logits = model.apply({"params": params}, task.graph, train=True, bits=bits, rngs={"dropout": key})
            sums = classification_sums(logits, task.train)
            return sums["loss"] / sums["count"]

        train_loss, grads = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        accuracy, loss = _validate(model, params, task, bits)
        better = (accuracy > state.best_accuracy) | ((accuracy == state.best_accuracy) & (loss < state.best_loss))
        found = (params, accuracy, loss, state.epoch + 1)
        best = (state.best_params, state.best_accuracy, state.best_loss, state.best_epoch)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)
        state = NodeState(state.epoch + 1, params, opt_state, state.key, *best)
        return state, {"train_loss": train_loss, "validation_loss": loss, "validation_accuracy": accuracy}

    return jax.lax.scan(epoch, state, length=epochs)


def _calibrated(model, params, task, bits, methods):
    # One part at a time, the other one exact meanwhile: each has its own method.
    for part, method in methods._asdict().items():
        if getattr(bits, part) is not None:
            alone = Bits(**{part: getattr(bits, part)})
            params = calibrate_clips(model, {"params": params}, task.graph, method=method, bits=alone)["params"]
    return params


def _validate(model, params, task, bits):
    sums = classification_sums(model.apply({"params": params}, task.graph, bits=bits), task.validation)
    return sums["correct"] / sums["count"], sums["loss"] / sums["count"]
