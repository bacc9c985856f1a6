"""Training steps are programs for accelerators too, though this machine may have none."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from qpde import graphs, models
from qpde.bits import Bits
from qpde.models import Smoothing
from train.config.images import Loss, Optimizer
from train.data.order import make_select
from train.steps import twin_clips
from train.steps.losses import LOSSES
from train.steps.optimizer import create_optimizer
from train.steps.state import create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_loss, make_train_step
from train.tasks.nodes_step import Task, init_seeds, start_seeds, train_seeds


def shape(dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def assert_lowers(trace):
    """For NVIDIA and TPUs in one program, which calls no routine that a platform may lack (those of LAPACK, say)."""
    program = trace().lower(lowering_platforms=("cuda", "tpu")).as_text()
    assert "_platform_index" in program
    assert "custom_call" not in program


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("resnet20", {"norm": "tied", "step_size": "auto", "smoothing": Smoothing(steps=2, learned=True)}, Loss()),
        ("stablenet20", {"per_channel": True, "levels": "apot"}, Loss("distillation")),
        ("mobilenetv2", {"compute_dtype": "bfloat16"}, Loss()),
    ],
    ids=["basic", "stable", "inverted"],
)
def test_the_training_step_of_every_family_of_image_networks_lowers_for_accelerators(name, options, loss):
    model = models.create(name, num_classes=3, weight_bits=4, act_bits=4, **options)
    # Every kind of block, at a fraction of the time to trace.
    model = model.clone(architecture=model.architecture.with_blocks(1, 2, 1))
    images, labels, key = shape((8, 8, 8, 3), jnp.uint8), shape((8,), jnp.int32), jax.random.key(0)
    variables = jax.eval_shape(model.init, key, shape((1, 8, 8, 3)))
    row = LOSSES[loss.name]
    params = jax.eval_shape(twin_clips.add_twin, variables["params"]) if row.twin else variables["params"]
    optimizer = create_optimizer(Optimizer(), params, steps=10)
    state = jax.eval_shape(lambda v: create_state(v, optimizer, key), variables | {"params": params})

    def prepare(key, images, labels):
        return images.astype(jnp.float32) / 128 - 1, jax.nn.one_hot(labels, 3), labels

    train_step = make_train_step(make_loss(model, loss), optimizer, prepare)
    step = make_epoch_step(train_step, make_select(steps_per_epoch=2, batch_size=4))
    assert_lowers(partial(step.trace, state, empty_totals(*row.logged), None, images, labels, labels))


@pytest.mark.parametrize("name", ["pde_gcn", "gcn", "gcnii", "gat"])
def test_the_training_step_of_every_graph_network_lowers_for_accelerators(name):
    model = models.create(name, num_classes=3, width=8, layers=2)
    optimizer, keys, labels = optax.sgd(0.1), jax.random.split(jax.random.key(0), 2), jnp.zeros(5, jnp.int32)
    ring = graphs.from_edges(jnp.arange(5), jnp.roll(jnp.arange(5), 1), num_nodes=5, nodes=jnp.ones((5, 4)))
    task, bits = Task(ring, labels, labels, labels), Bits(jnp.float32(4), jnp.float32(4))
    params = jax.eval_shape(partial(init_seeds, model, methods=Bits("absmax", "absmax"), at_once=1), keys, task, bits)
    states = jax.eval_shape(partial(start_seeds, model, optimizer, at_once=1), params, keys, task, bits)
    assert_lowers(partial(train_seeds.trace, model, optimizer, states, task, bits, epochs=2, at_once=1))
