"""Losses against their formulas in NumPy, the twin's own clips, and what varies labels and averages parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpde.bits import Bits
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from train.config.images import Loss
from train.data.augment import mixup
from train.steps import twin_clips
from train.steps.losses import IGNORED, LOSSES, Outputs, classification_sums, cross_entropy, similarity
from train.steps.state import create_state
from train.steps.train_step import make_loss, make_train_step


def _outputs(seed):
    """Random passes of two blocks as NumPy arrays, low near high, and targets."""
    rng = np.random.default_rng(seed)
    high = [rng.normal(size=(4, 3, 3, 2)).astype(np.float32), rng.normal(size=(4, 2, 2, 5)).astype(np.float32)]
    low = [a + 0.2 * rng.normal(size=a.shape).astype(np.float32) for a in high]
    logits = rng.normal(size=(2, 4, 6)).astype(np.float32)
    targets = rng.dirichlet(np.ones(6), 4).astype(np.float32)
    return Outputs(logits[0], low), Outputs(logits[1], high), targets


def _numpy_similarity(high, low, bits):
    total = 0.0
    for a_high, a_low in zip(high, low, strict=True):
        threshold = np.abs(a_high).max() / (2**bits - 1)
        d = a_high - a_low
        shrunk = np.where(d > threshold, d - threshold, np.where(d < -threshold, d + threshold, 0.0))
        total += np.sum(shrunk.astype(np.float64) ** 2)
    return total / len(high)


def _numpy_cross_entropy(logits, targets, smoothing):
    targets = targets * (1 - smoothing) + smoothing / 6
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    return -np.mean((targets * log_p).sum(1))


@given(seed=st.integers(0, 100), bits=st.integers(2, 8), smoothing=st.sampled_from([0.0, 0.1]))
def test_each_loss_is_its_formula(seed, bits, smoothing):
    low, high, targets = _outputs(seed)
    config = Loss(label_smoothing=smoothing, similarity_weight=0.3)
    ce_low, ce_high = (_numpy_cross_entropy(p.logits, targets, smoothing) for p in (low, high))
    sim = _numpy_similarity(high.states, low.states, bits)
    expected = {"cross_entropy": ce_low, "distillation": ce_high + ce_low + 0.3 * sim, "similarity": 0.3 * sim}
    assert expected.keys() == LOSSES.keys()
    for name, value in expected.items():
        terms = LOSSES[name].formula(low, high, targets, bits, config)
        assert float(terms["loss"]) == pytest.approx(value, rel=1e-4, abs=1e-6)  # float32 sums
        assert tuple(terms)[1:] == LOSSES[name].logged
        if LOSSES[name].twin:
            assert float(terms["similarity"]) == pytest.approx(sim / 4, rel=1e-4, abs=1e-6)


def test_no_gradient_flows_through_the_threshold():
    """Its derivative with respect to the largest output would otherwise be minus the shrunk difference over 3."""
    high = jnp.array([[9.0, 1.0]])
    low = jnp.array([[8.0, -4.0]])  # differences 1 and 5, threshold 9 / 3
    gradient = jax.grad(lambda a: similarity([a], [low], 2))(high)
    np.testing.assert_allclose(gradient, [[0.0, 2 * (5 - 3)]])
    np.testing.assert_allclose(jax.grad(lambda a: similarity([high], [a], 2))(low), [[0.0, -4.0]])


def test_cross_entropy_of_one_hot_targets_has_the_gradient_of_the_softmax():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    targets = jax.nn.one_hot(jnp.array([0, 1, 2, 3, 0]), 4)
    gradient = jax.grad(cross_entropy)(logits, targets)
    np.testing.assert_allclose(gradient, (jax.nn.softmax(logits) - targets) / 5, atol=1e-7)


# The twin's clips


@pytest.fixture(scope="module")
def network():
    """Two blocks with a twin, its clips twice the network's, images and targets."""
    registry.ARCHITECTURES["tiny"] = Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1),))
    model = registry.create("tiny", num_classes=3, weight_bits=4, act_bits=3)
    del registry.ARCHITECTURES["tiny"]
    x = jax.random.normal(jax.random.key(1), (8, 6, 6, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params = twin_clips.add_twin(variables.pop("params"))
    params[twin_clips.TWIN] = jax.tree.map(lambda clip: 2 * clip, params[twin_clips.TWIN])
    return model, params, variables, x, jax.nn.one_hot(jnp.arange(8) % 3, 3)


def test_the_twin_has_activation_clips_of_its_own_and_shares_everything_else(network):
    _, params, *_ = network
    low, high = twin_clips.low(params), twin_clips.high(params)
    assert low.keys() == high.keys() == params.keys() - {twin_clips.TWIN}
    assert not twin_clips.has_twin(low)

    def check(path, a, b):
        factor = 2.0 if path[-1].key == "act_clips" else 1.0
        np.testing.assert_array_equal(factor * a, b)

    jax.tree.map_with_path(check, low, high)
    assert len(jax.tree.leaves(params[twin_clips.TWIN])) == 2  # one array for each of the two blocks


@pytest.mark.parametrize("bits", [None, Bits(4, 5)])
def test_the_distillation_loss_runs_both_passes_at_their_widths(network, bits):
    model, params, state, x, targets = network
    loss = jax.jit(make_loss(model, Loss("distillation", similarity_weight=0.1)))
    value, (terms, logits, updated) = loss(params, state, x, targets, bits)

    apply = jax.jit(
        lambda p, bits: model.apply(
            {"params": p, **state}, x, train=True, bits=bits, return_states=True, mutable=["batch_stats"]
        )
    )
    act_bits = 3 if bits is None else 5
    low, low_state = apply(twin_clips.low(params), Bits(4, act_bits))
    high, _ = apply(twin_clips.high(params), Bits(4, 32))
    expected = LOSSES["distillation"].formula(
        Outputs(*low), Outputs(*high), targets, act_bits, Loss(similarity_weight=0.1)
    )
    assert float(value) == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert float(terms["similarity"]) == pytest.approx(float(expected["similarity"]), rel=1e-4)
    np.testing.assert_allclose(logits, low[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updated, low_state)


def test_similarity_alone_lowers_the_difference_of_the_passes(network):
    model, params, state, x, targets = network
    optimizer = optax.sgd(1e-2)
    loss = make_loss(model, Loss("similarity", similarity_weight=1e-2))
    step = jax.jit(make_train_step(loss, optimizer, lambda key, images, labels: (images, targets, labels)))
    training = create_state({"params": params, **state}, optimizer, jax.random.key(0))
    values = []
    for _ in range(10):
        training, sums = step(training, (x, jnp.arange(8) % 3), training.key, None)
        values.append(float(sums["similarity"] / sums["count"]))
    assert values[-1] < 0.9 * values[0]


# Mixing and averaging


@given(seed=st.integers(0, 50))
def test_mixup_mixes_images_and_targets_with_the_same_shares_and_partners(seed):
    n = 6
    x = jnp.eye(n).reshape(n, n, 1, 1)
    mixed, targets = mixup(jax.random.key(seed), x, jnp.eye(n), mixup_alpha=0.4)
    np.testing.assert_array_equal(mixed.reshape(n, n), targets)
    targets = np.asarray(targets)
    np.testing.assert_allclose(targets.sum(0), 1.0, atol=1e-6)  # each image is itself and once a partner
    np.testing.assert_allclose(targets.sum(1), 1.0, atol=1e-6)
    assert np.all(np.diag(targets) >= 0.5 - 1e-6)
    others = targets[(targets > 0) & (targets < 0.5 - 1e-6)]
    assert np.ptp(others) < 1e-6 if others.size else True  # one share for the batch


def test_mixups_share_follows_its_distribution():
    """Beta(1, 1) is uniform, so the larger of s and 1 - s is uniform on [1/2, 1]: mean 3/4, deviation 0.144."""
    x, targets = jnp.zeros((2, 1, 1, 1)), jnp.eye(2)
    mix = jax.jit(jax.vmap(lambda key: mixup(key, x, targets, mixup_alpha=1.0)[1]))
    mixed = np.asarray(mix(jax.random.split(jax.random.key(0), 2000)))
    shares = mixed[:, 0, 0][mixed[:, 0, 0] < 1]  # where the two were exchanged
    assert abs(len(shares) - 1000) < 4 * np.sqrt(2000) / 2
    assert abs(shares.mean() - 0.75) < 4 * 0.144 / np.sqrt(len(shares))


def test_averages_follow_their_formula_and_are_what_is_evaluated():
    optimizer = optax.sgd(1.0)
    loss = lambda params, state, x, targets, bits: (  # noqa: E731
        jnp.sum(params["w"]),
        ({"loss": jnp.float32(0)}, jnp.zeros((1, 2)), {"batch_stats": state["batch_stats"] + 1}),
    )
    step = jax.jit(make_train_step(loss, optimizer, lambda key, x, y: (x, y, y), averaging=0.2))
    state = create_state(
        {"params": {"w": jnp.zeros(1)}, "batch_stats": jnp.zeros(1)}, optimizer, jax.random.key(0), averaging=True
    )
    average = 0.0
    for t in range(1, 5):
        state, _ = step(state, (jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)), state.key, None)
        keep = min(0.2, (1 + t) / (10 + t))
        average = keep * average + (1 - keep) * -t
        assert float(state.variables["params"]["w"][0]) == -t
        assert float(state.averaged.variables["params"]["w"][0]) == pytest.approx(average, rel=1e-6)
        assert float(state.averaged.variables["batch_stats"][0]) == pytest.approx(-average, rel=1e-6)
    without = state.replace(averages=None)
    assert without.averaged is without


@given(fill=st.integers(0, 3), seed=st.integers(0, 100))
def test_ignored_examples_change_no_sum(fill, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(6, 3)).astype(np.float32), rng.integers(0, 3, 6).astype(np.int32)
    kept = 6 - fill
    labels[kept:] = IGNORED
    sums = classification_sums(jnp.asarray(logits), jnp.asarray(labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = probabilities[np.arange(kept), labels[:kept]]
    assert sums["loss"] == pytest.approx(-np.log(right).sum(), rel=1e-5)
    assert float(sums["correct"]) == (logits.argmax(1) == labels)[:kept].sum()
    assert float(sums["count"]) == kept
