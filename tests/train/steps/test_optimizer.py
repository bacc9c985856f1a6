"""The directions of the image networks' optimizer against their published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config.images import Optimizer, Rule
from train.steps.optimizer import create_optimizer, rule_of_each


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_has_the_schedule_the_rules_and_its_own_place_for_the_decay(name):
    """Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2."""
    config = Optimizer(
        name=name,
        learning_rate=0.01,
        schedule="cosine",
        momentum=0.8,
        weight_decay=0.1,
        rules=(Rule("clip", learning_rate=3.0, weight_decay=0.0),),
    )
    grads = [{"kernel": np.array([0.3, -0.2]) * k, "clip": np.array([0.5 / k])} for k in (1, 2, 3, 4)]
    params = {"kernel": jnp.array([1.0, -2.0]), "clip": jnp.array([3.0])}
    expected = {key: np.asarray(value, np.float64) for key, value in params.items()}
    first, second = ({key: np.zeros_like(value) for key, value in expected.items()} for _ in range(2))
    optimizer = create_optimizer(config, params, steps=4)
    state = optimizer.init(params)
    for t, gradient in enumerate(grads):
        given = {key: jnp.asarray(value, jnp.float32) for key, value in gradient.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax's own counter is an integer
            updates, state = optimizer.update(given, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.01 * (1 + np.cos(np.pi * t / 4)) / 2
        for key, (factor, decay) in {"kernel": (1.0, 0.1), "clip": (3.0, 0.0)}.items():
            w = expected[key]
            g = gradient[key] + (decay * w if name == "adam" else 0)
            first[key] = 0.8 * first[key] + 0.2 * g
            second[key] = 0.999 * second[key] + 0.001 * g**2
            direction = first[key] / (1 - 0.8 ** (t + 1)) / (np.sqrt(second[key] / (1 - 0.999 ** (t + 1))) + 1e-8)
            expected[key] = w - factor * rate * (direction + (decay * w if name == "adamw" else 0))
    for key, value in expected.items():
        np.testing.assert_allclose(params[key], value, rtol=1e-5)


def test_an_experiment_that_trains_nothing_has_an_optimizer():
    params = {"kernel": jnp.ones(2)}
    for schedule in ("one_cycle", "cosine", "constant"):
        create_optimizer(Optimizer(schedule=schedule), params, steps=0).init(params)


PARAMS = {
    "stage0": {"kernel": jnp.ones((2,)), "clip_weight": jnp.full((3,), 2.0)},
    "head": {"kernel": jnp.ones((2,))},
}


def test_the_first_rule_found_in_the_path_counts():
    rules = (Rule("clip", 10.0), Rule("stage0/", 2.0))
    chosen = rule_of_each(rules, PARAMS)
    assert chosen["stage0"]["clip_weight"] == rules[0]
    assert chosen["stage0"]["kernel"] == rules[1]
    assert chosen["head"]["kernel"] == Rule("")


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="rule 'clop' matches none of the 3 parameters"):
        create_optimizer(Optimizer(rules=(Rule("clop"),)), PARAMS, steps=10)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_optimizer_is_the_formula_with_a_group_for_each_rule(nesterov):
    """PyTorch's order, which the published recipes assume; its own SGD gave the same numbers."""
    config = Optimizer(
        learning_rate=0.1,
        schedule="cosine",
        nesterov=nesterov,
        weight_decay=0.01,
        rules=(Rule("clip", learning_rate=3.0, weight_decay=0.0),),
    )
    grads = {"kernel": jnp.array([0.3, -0.2]), "clip": jnp.array([0.5])}
    params = {"kernel": jnp.array([1.0, -2.0]), "clip": jnp.array([3.0])}
    expected = {name: np.asarray(value, np.float64) for name, value in params.items()}
    momentum = {name: np.zeros_like(value) for name, value in expected.items()}
    optimizer = create_optimizer(config, params, steps=5)
    state = optimizer.init(params)
    for step in range(5):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.1 * (1 + np.cos(np.pi * step / 5)) / 2
        for name, (factor, decay) in {"kernel": (1.0, 0.01), "clip": (3.0, 0.0)}.items():
            g = np.asarray(grads[name]) + decay * expected[name]
            momentum[name] = 0.9 * momentum[name] + g
            direction = g + 0.9 * momentum[name] if nesterov else momentum[name]
            expected[name] = expected[name] - factor * rate * direction
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5)  # float32, five steps


def test_a_learned_gamma2_decays_by_its_own_rule_alone():
    params = {"stage0": {"gamma2": jnp.ones(2), "kernel": jnp.ones(2)}}
    nothing = jax.tree.map(jnp.zeros_like, params)
    for rules, decays in (((), False), ((Rule("gamma2", 10.0),), False), ((Rule("gamma2", weight_decay=0.1),), True)):
        optimizer = create_optimizer(Optimizer(weight_decay=0.1, rules=rules), params, steps=5)
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
        assert [bool(leaf.any()) for leaf in jax.tree.leaves(updates)] == [decays, True]
