"""Help for own training loops: labels, projections, and a loop of twenty lines that learns digits in four bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import qpde
from qpde import models
from qpde.nn.training import SMALLEST_CLIP

SMOOTHING = models.Smoothing(gamma2=0.02, learned=True)


def test_labels_tell_clips_and_smoothing_from_weights_in_every_kind_of_network():
    x = jnp.zeros((1, 8, 8, 3))
    own = qpde.quantized(nn.Conv(2, (3, 3)), [qpde.Rule("", signed=True, smoothing=SMOOTHING)])
    labels = qpde.optimizer_labels(own.init(jax.random.key(0), x)["params"])
    assert labels == {
        "kernel": "weights",
        "bias": "weights",
        "weight_clips": "clips",
        "act_clips": "clips",
        "gamma2_share": "smoothing",
    }
    registered = models.create("resnet20", num_classes=2, weight_bits=4, act_bits=4, smoothing=SMOOTHING)
    params = jax.eval_shape(registered.init, jax.random.key(0), x)["params"]
    labels = qpde.optimizer_labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert set(jax.tree.leaves(labels)) == {"weights", "clips", "smoothing"}


def test_projection_raises_clips_bounds_shares_and_touches_nothing_else():
    params = {
        "layer": {"kernel": jnp.float32(-5), "weight_clips": jnp.array([-1.0, 2.0]), "act2_clips": jnp.float32(0)},
        "smooth": {"gamma2_share": jnp.float32(1.5)},
        "other": {"gamma2_share": jnp.float32(-0.5)},
    }
    found = jax.jit(qpde.project)(params)
    assert found["layer"]["kernel"] == -5
    np.testing.assert_allclose(found["layer"]["weight_clips"], [SMALLEST_CLIP, 2.0])
    np.testing.assert_allclose(found["layer"]["act2_clips"], SMALLEST_CLIP)
    assert found["smooth"]["gamma2_share"] == 1
    assert found["other"]["gamma2_share"] == 0


def test_a_learned_gamma2_of_our_networks_stays_in_the_range_that_they_give():
    model = models.create("stablenet20", num_classes=2, smoothing=SMOOTHING)
    (path, (low, high)) = next(iter(model.ranges.items()))
    stage, name, _ = path.split("/")
    params = {stage: {name: {"gamma2": jnp.array([-1.0, 9.0])}}}
    np.testing.assert_allclose(qpde.project(params, model)[stage][name]["gamma2"], [low, high])
    inside = qpde.project({"params": params}, model)  # whole collections too
    np.testing.assert_allclose(inside["params"][stage][name]["gamma2"], [low, high])
    with pytest.raises(ValueError, match=r"gamma2' belongs to its network: call project\(params, model\)"):
        qpde.project(params)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@pytest.mark.usefixtures("compiled_once")
@jax.numpy_dtype_promotion("standard")  # of optax
@jax.numpy_rank_promotion("allow")
def test_an_own_optax_loop_of_twenty_lines_learns_digits_in_four_bits():
    x, y = load_digits(return_X_y=True)
    x = jnp.asarray(x.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    train, test = slice(0, 1400), slice(1400, None)

    rules = [qpde.Rule("Conv_0", weights=4, activations=4, signed=True),
             qpde.Rule("Conv|head", weights=4, activations=4, signed=False)]  # fmt: skip
    model = qpde.quantized(CNN(), rules)
    variables = model.init(jax.random.key(0), x[:1])
    variables = models.calibrate_clips(model, variables, x[:256], train=True)
    params, statistics = variables["params"], variables["batch_stats"]
    kinds = {"weights": optax.adamw(3e-3), "clips": optax.adam(3e-3), "smoothing": optax.adam(1e-3)}
    optimizer = optax.multi_transform(kinds, qpde.optimizer_labels)
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state, x, y):
        def loss(params):
            variables = {"params": params, "batch_stats": statistics}
            logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates["batch_stats"]

        grads, statistics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return qpde.project(optax.apply_updates(params, updates), model), statistics, state

    rng = np.random.default_rng(0)
    for _ in range(12):
        for rows in rng.permutation(1400).reshape(-1, 100):
            params, statistics, state = step(params, statistics, state, x[train][rows], y[train][rows])
    trained = {"params": params, "batch_stats": statistics}

    clips = jax.tree.leaves(
        jax.tree.map(lambda p, k: p if k == "clips" else None, params, qpde.optimizer_labels(params))
    )
    before = jax.tree.leaves(
        jax.tree.map(lambda p, k: p if k == "clips" else None, variables["params"], qpde.optimizer_labels(params))
    )
    assert min(map(float, clips)) >= SMALLEST_CLIP
    assert all(a != b for a, b in zip(clips, before, strict=True))
    found = qpde.measure.compare(model, trained, [(x[test], y[test])], qpde.Bits(4, 4))
    assert found.accuracy > 0.85
    assert found.agreement > 0.9
