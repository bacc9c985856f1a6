"""A problem of three classes and a stand-in for a network, which trains in a second."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.config.images import Loss, Optimizer
from train.data.augment import random_flip
from train.data.order import epoch_order, make_select
from train.steps.optimizer import create_optimizer
from train.steps.state import create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_loss, make_train_step


class Tiny(nn.Module):
    """A stand-in with batch statistics."""

    @nn.compact
    def __call__(self, x, *, train=False, bits=None, return_states=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


def normalize(images):
    return images.astype(jnp.float32) / 128 - 1


def problem(batch_size=8, count=32, learning_rate=0.1):
    """Three classes of noisy images, a state, and the jitted step."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = np.clip(rng.normal(60, 10, (count, 4, 4, 1)) + 60 * labels[:, None, None, None], 0, 255).astype(np.uint8)
    model = Tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 4, 4, 1)))
    steps = 10 * count // batch_size
    optimizer = create_optimizer(Optimizer(learning_rate=learning_rate), variables["params"], steps=steps)
    state = create_state(variables, optimizer, jax.random.key(1))
    prepare = lambda key, x, labels: (normalize(random_flip(key, x)), jax.nn.one_hot(labels, 3), labels)  # noqa: E731
    traced = []

    def train_step(*arguments):
        traced.append(1)
        return make_train_step(make_loss(model, Loss()), optimizer, prepare)(*arguments)

    step = make_epoch_step(train_step, make_select(steps_per_epoch=count // batch_size, batch_size=batch_size))
    return model, state, step, (jnp.asarray(images), jnp.asarray(labels)), traced


def train(state, step, data, epochs):
    losses = []
    for _ in range(epochs):
        order, totals = epoch_order(state, count=32, steps_per_epoch=4), empty_totals()
        for _ in range(4):
            state, totals = step(state, totals, None, *data, order)
        losses.append(float(totals["loss"] / totals["count"]))
    return state, losses, totals
