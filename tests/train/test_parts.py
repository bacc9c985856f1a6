"""The parts of the application: configuration, optimizer, losses, augmentation, the step, checkpoints."""

import dataclasses
import io
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qpde.bits import Bits
from qpde.datasets import Split
from qpde.models import Smoothing
from train.commands.cli import load_recipes
from train.config.images import (
    Annealing,
    BitSchedule,
    Data,
    Experiment,
    Loss,
    Model,
    Optimizer,
    Rule,
    StrengthSchedule,
    Variant,
)
from train.config.recipes import any_bit
from train.config.serialize import from_json, to_json
from train.data.augment import random_crop, random_flip
from train.data.order import epoch_order, make_select
from train.data.resident import stack_batches
from train.host.allocator import keep_freed_memory
from train.host.console import print_table
from train.runs.checkpoints import CheckpointError, Checkpoints
from train.steps.annealing import is_annealed, make_draw, strength_of, widths_of
from train.steps.guards import SMALLEST_CLIP, clips_of, hold, make_explain
from train.steps.learning_rates import SCHEDULES, cosine, one_cycle
from train.steps.losses import IGNORED, classification_sums
from train.steps.optimizer import create_optimizer, rule_of_each
from train.steps.state import RANDOM, create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_evaluate, make_loss, make_train_step
from train.tasks.images_summary import _table

ROOT = Path(__file__).parents[2]

EXPERIMENT = Experiment(
    name="example",
    variants=(Variant("symmetric"), Variant("plain", {"symmetric": False})),
    model=Model(smoothing=Smoothing(blocks=(1, 2))),
    optimizer=Optimizer(rules=(Rule("clip", learning_rate=10.0, weight_decay=0.0),)),
    annealing=Annealing(activations=BitSchedule("listed", widths=(8, 6))),
)


# Configuration


def _changed(**changes):
    return from_json(json.dumps(json.loads(to_json(EXPERIMENT)) | changes))


def test_an_experiment_survives_json():
    assert from_json(to_json(EXPERIMENT)) == EXPERIMENT
    assert from_json(to_json(dataclasses.replace(EXPERIMENT, model=Model(), only=("plain",)))).only == ("plain",)
    smoothed = dataclasses.replace(EXPERIMENT, variants=(Variant("smoothed", {"smoothing": Smoothing(blocks=(0, 2))}),))
    assert from_json(to_json(smoothed)) == smoothed
    steps = dataclasses.replace(
        EXPERIMENT, variants=(Variant("a", {"step_size": "auto"}), Variant("b", {"step_size": 1}))
    )
    assert from_json(to_json(steps)) == steps


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Optimizer(learning_rate=0.0), r"learning_rate \(=0.0\) must be positive"),
        (lambda: Optimizer(learning_rate=math.inf), r"learning_rate \(=inf\)"),
        (lambda: Optimizer(momentum=1.0), r"momentum \(=1.0\) must lie in \[0, 1\)"),
        (lambda: Optimizer(momentum=0.0, nesterov=True), "nesterov needs a momentum"),
        (lambda: Optimizer(weight_decay=-1.0), r"weight_decay \(=-1.0\)"),
        (lambda: Rule("("), "not a regular expression"),
        (lambda: Rule("clip", learning_rate=math.nan), r"rule 'clip' \(=nan\)"),
        (lambda: Data(size=0), r"data.size \(=0\) must be at least 1"),
        (lambda: Data(crop_padding=-1), r"crop_padding \(=-1\)"),
        (lambda: dataclasses.replace(EXPERIMENT, variants=(Variant("a", {"colour": 1}),)), "colour"),
        (lambda: Variant("../a"), "names a folder"),
        (lambda: dataclasses.replace(EXPERIMENT, name=""), "names a folder"),
        (lambda: dataclasses.replace(EXPERIMENT, epochs=0), r"epochs \(=0\) trains nothing: give --start-from"),
        (lambda: dataclasses.replace(EXPERIMENT, batch_size=1), r"batch_size \(=1\) must be at least 2"),
        (lambda: dataclasses.replace(EXPERIMENT, variants=()), "at least one"),
        (lambda: dataclasses.replace(EXPERIMENT, variants=(Variant("a"), Variant("a"))), "different names"),
        (lambda: dataclasses.replace(EXPERIMENT, only=("b",)), "choose from"),
        (lambda: Data(mixup=-1.0), r"data.mixup \(=-1.0\)"),
        (lambda: Loss(label_smoothing=1.0), r"label_smoothing \(=1.0\) must lie in \[0, 1\)"),
        (lambda: Loss(similarity_weight=math.nan), r"similarity_weight \(=nan\)"),
        (lambda: Optimizer(averaging=1.0), r"averaging \(=1.0\) must lie in \[0, 1\)"),
        (lambda: BitSchedule(every=0), r"every \(=0\)"),
        (lambda: BitSchedule(widths=(8, 40)), "holds 40: widths are 2 to 32"),
        (lambda: StrengthSchedule("rise", 0), r"annealing.smoothing.epochs \(=0\)"),
        (lambda: BitSchedule("random"), "needs widths to draw from"),
        (lambda: from_json("{}"), "not an experiment of this version"),
        (lambda: from_json("{"), "property name"),
        (lambda: _changed(epochs="ten"), r"epochs \(='ten'\) must be int"),
        (lambda: _changed(epochs=True), r"epochs \(=True\) must be int"),
        (lambda: _changed(only="plain"), r"only \(='plain'\) must be"),
        (lambda: _changed(model={"weight_bits": "four"}), r"weight_bits \(='four'\) must be int"),
        (lambda: _changed(model={"step_size": "long"}), r"step_size \(='long'\) must be"),
        (lambda: _changed(seed=None), r"seed \(=None\) must be int"),
    ],
)
def test_a_bad_value_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Schedules


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
@given(steps=st.integers(1, 2000), peak=st.floats(1e-3, 10.0))
def test_a_schedule_stays_between_zero_and_its_peak_and_ends_near_zero(name, steps, peak):
    schedule = SCHEDULES[name](peak, steps)
    rates = np.asarray(schedule(jnp.array([0, steps // 10, 3 * steps // 10, steps // 2, steps, steps + 1])))
    assert np.all(rates >= -1e-6 * peak)  # float32 rounding of a cosine
    assert np.all(rates <= peak * (1 + 1e-6))
    assert np.all(np.abs(rates[-2:]) <= 1e-5 * peak)


def test_a_constant_rate_is_its_peak_throughout():
    np.testing.assert_array_equal(SCHEDULES["constant"](0.1, 5)(jnp.arange(7)), np.float32(0.1))


def test_cosine_is_the_published_formula():
    schedule = cosine(0.1, 200)
    for t in (0, 50, 100, 150, 200):
        assert schedule(jnp.int32(t)) == pytest.approx(0.05 * (1 + math.cos(math.pi * t / 200)), abs=1e-8)


def test_one_cycle_rises_to_its_peak_at_three_tenths_and_then_falls():
    rates = np.asarray(one_cycle(1.0, 100)(jnp.arange(101)))
    assert np.argmax(rates) == 30
    assert rates[0] == pytest.approx(1 / 25)
    assert np.all(np.diff(rates[:31]) > 0)
    assert np.all(np.diff(rates[30:]) < 0)


# Optimizer

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


# Losses


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


# Augmentation


def _images(seed, n=6, side=8, channels=2):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 256, (n, side, side, channels)), jnp.uint8)


@given(seed=st.integers(0, 1000))
def test_flipping_twice_with_the_same_key_is_the_identity(seed):
    images, key = _images(seed), jax.random.key(seed)
    np.testing.assert_array_equal(random_flip(key, random_flip(key, images)), images)


def test_half_of_the_images_are_flipped():
    images = _images(0, n=2000, side=2, channels=1)
    flipped = np.any(np.asarray(random_flip(jax.random.key(0), images)) != np.asarray(images), axis=(1, 2, 3))
    changeable = np.any(np.asarray(images[:, :, ::-1]) != np.asarray(images), axis=(1, 2, 3))
    assert abs(flipped[changeable].mean() - 0.5) < 4 * 0.5 / math.sqrt(changeable.sum())  # 4 standard deviations


@given(seed=st.integers(0, 1000))
def test_a_crop_moves_each_image_by_at_most_the_padding_and_moves_zeros_in(seed):
    images, padding = _images(seed), 3
    cropped = np.asarray(random_crop(jax.random.key(seed), images, padding=padding))
    for image, crop in zip(np.asarray(images), cropped, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        places = [
            (i, j)
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
            if np.array_equal(padded[i : i + 8, j : j + 8], crop)
        ]
        assert len(places) == 1  # the images have no zeros, so the place is unique


def test_crops_reach_every_place_and_differ_between_images():
    marked = jnp.zeros((2000, 5, 5, 1), jnp.uint8).at[:, 2, 2].set(1)
    cropped = np.asarray(random_crop(jax.random.key(1), marked, padding=2))[..., 0]
    places = {tuple(np.argwhere(image)[0]) for image in cropped}
    assert places == {(i, j) for i in range(5) for j in range(5)}


def test_augmentation_is_determined_by_its_key():
    images = _images(0)
    for vary in (random_flip, lambda key, x: random_crop(key, x, padding=2)):
        once, again = vary(jax.random.key(3), images), vary(jax.random.key(3), images)
        np.testing.assert_array_equal(once, again)
        assert np.any(np.asarray(once) != np.asarray(vary(jax.random.key(4), images)))


# Widths over the epochs


def test_each_schedule_is_its_formula_weights_and_activations_apart():
    annealing = Annealing(BitSchedule("staircase", start=6, every=2), BitSchedule("listed", every=3, widths=(16, 8)))
    widths = widths_of(annealing, Bits(4, 3), 10)
    assert [widths(epoch).weights for epoch in range(1, 11)] == [6, 6, 5, 5, 4, 4, 4, 4, 4, 4]
    assert [widths(epoch).activations for epoch in range(1, 11)] == [16, 16, 16, 8, 8, 8, 3, 3, 3, 3]
    assert widths_of(Annealing(), Bits(None, 4), 1)(1) == Bits(None, 4)


@pytest.mark.parametrize(
    ("annealing", "target", "message"),
    [
        (
            Annealing(weights=BitSchedule("staircase")),
            Bits(4, 4),
            "weights ends at 16 bits after 10 epochs, not at the",
        ),
        (Annealing(activations=BitSchedule("staircase", every=1)), Bits(4, None), "activations has no target"),
        (Annealing(weights=BitSchedule("staircase", start=3)), Bits(4, 4), None),
    ],
)
def test_a_schedule_must_reach_the_models_width(annealing, target, message):
    if message is None:  # it starts below the target and so is there at once
        assert widths_of(annealing, target, 10)(1).weights == 4
    else:
        with pytest.raises(ValueError, match=message):
            widths_of(annealing, target, 10)


def test_smoothing_rises_or_falls_in_equal_steps():
    rise, fall = (strength_of(StrengthSchedule(name, 4), smooths=True, epochs=6) for name in ("rise", "fall"))
    assert [rise(epoch) for epoch in range(1, 7)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [fall(epoch) for epoch in range(1, 7)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert strength_of(StrengthSchedule(), smooths=False, epochs=0)(1) is None
    with pytest.raises(ValueError, match="nothing to schedule: give the recipe's model smoothing"):
        strength_of(StrengthSchedule("fall", 4), smooths=False, epochs=6)
    with pytest.raises(ValueError, match=r"annealing.smoothing.epochs \(=4\) leaves none of 4 epochs"):
        strength_of(StrengthSchedule("rise", 4), smooths=True, epochs=4)


def test_random_widths_are_all_drawn_alike_from_the_key_alone_and_validated_at_the_models_own():
    annealing = Annealing(weights=BitSchedule("random", widths=(2, 8)))
    assert not is_annealed(annealing)
    assert [widths_of(annealing, Bits(4, 3), 9)(epoch) for epoch in (1, 9)] == [Bits(4, 3)] * 2
    keys = jax.random.split(jax.random.key(0, impl=RANDOM), 600)
    draw = jax.jit(make_draw(annealing, Bits(4, 3)))
    drawn = [draw(key, None) for key in keys]
    assert {int(bits.activations) for bits in drawn} == {3}
    values, counts = np.unique([int(bits.weights) for bits in drawn], return_counts=True)
    np.testing.assert_array_equal(values, [2, 4, 8])
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(600 * 2 / 9))
    # Trained together as alone, at widths of their own.
    together = jax.vmap(draw)(keys[:8], Bits(jnp.full(8, 5), jnp.full(8, 6)))
    alone = [int(draw(key, Bits(5, 6)).weights) for key in keys[:8]]
    np.testing.assert_array_equal(together.weights, alone)


@pytest.mark.parametrize("own", [4, 3, 5])
def test_any_bit_draws_all_its_widths_alike_whichever_is_the_models_own(own):
    recipe = any_bit(dataclasses.replace(EXPERIMENT, model=Model(weight_bits=4, act_bits=4)), name="any")
    keys = jax.random.split(jax.random.key(0, impl=RANDOM), 1200)
    draw = make_draw(recipe.annealing, Bits(own, own))
    found = jax.jit(lambda keys: jax.lax.map(lambda key: draw(key, None), keys))(keys)
    others = [width for width in (2, 3, 4, 6, 8, 32) if width != own]
    values, counts = np.unique(found.activations, return_counts=True)
    np.testing.assert_array_equal(values, sorted([*others, own]))
    expected = 1200 / len(values)
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))
    # As they were always drawn: the model's own width is the last one.
    for i in range(8):
        key, _ = jax.random.split(jax.random.fold_in(keys[i], 1))
        assert found.weights[i] == [*others, own][int(jax.random.randint(key, (), 0, len(others) + 1))]


def test_without_random_schedules_the_widths_of_a_step_are_those_given():
    draw = make_draw(Annealing(activations=BitSchedule("listed", widths=(8,))), Bits(4, 4))
    assert draw(jax.random.key(0), None) is None
    assert draw(jax.random.key(0), Bits(4, 8)) == Bits(4, 8)


# What is printed


def test_the_table_of_many_variants_is_whole_where_lines_are_short():
    digits = load_recipes(Path(__file__).parents[2] / "configs" / "digits.py")["smoothing"]
    results = {variant.name: {"parameters": 272186, "accuracy": 0.9875} for variant in digits.variants}
    printed = io.StringIO()
    print_table(Console(file=printed, width=80), _table(digits, results))
    lines = printed.getvalue().splitlines()
    assert sum(line.count("272,186") for line in lines) == sum(line.count("98.75%") for line in lines) == 7
    assert len({len(line) for line in lines[1:]}) == 1


# The step


class Tiny(nn.Module):
    """A stand-in with batch statistics; its dense layer can be made to break down."""

    @nn.compact
    def __call__(self, x, *, train=False, bits=None, return_states=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


def _normalize(images):
    return images.astype(jnp.float32) / 128 - 1


def _problem(batch_size=8, count=32, learning_rate=0.1):
    """Three classes of noisy images, a state, and the jitted step."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = np.clip(rng.normal(60, 10, (count, 4, 4, 1)) + 60 * labels[:, None, None, None], 0, 255).astype(np.uint8)
    model = Tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 4, 4, 1)))
    steps = 10 * count // batch_size
    optimizer = create_optimizer(Optimizer(learning_rate=learning_rate), variables["params"], steps=steps)
    state = create_state(variables, optimizer, jax.random.key(1))
    prepare = lambda key, x, labels: (_normalize(random_flip(key, x)), jax.nn.one_hot(labels, 3))  # noqa: E731
    traced = []

    def train_step(*arguments):
        traced.append(1)
        return make_train_step(make_loss(model, Loss()), optimizer, prepare)(*arguments)

    step = make_epoch_step(train_step, make_select(steps_per_epoch=count // batch_size, batch_size=batch_size))
    return model, state, step, (jnp.asarray(images), jnp.asarray(labels)), traced


def _train(state, step, data, epochs):
    losses = []
    for _ in range(epochs):
        order, totals = epoch_order(state, count=32, steps_per_epoch=4), empty_totals()
        for _ in range(4):
            state, totals = step(state, totals, None, *data, order)
        losses.append(float(totals["loss"] / totals["count"]))
    return state, losses, totals


def test_training_lowers_the_loss_and_compiles_once():
    model, state, step, data, traced = _problem()
    state, losses, totals = _train(state, step, data, 10)
    assert losses[-1] < 0.2 * losses[0]
    assert int(state.step) == 40
    assert float(totals["count"]) == 32
    assert not totals["broken"]
    assert float(totals["collapsed_clips"]) == 0
    assert len(traced) == 1
    scores = make_evaluate(model, _normalize)(state.variables, [(data[0][None], data[1][None])])
    assert scores["accuracy"] > 0.9


def test_the_step_gives_its_old_state_back_to_the_device():
    _, state, step, data, _ = _problem()
    kernel, totals = state.params["Dense_0"]["kernel"], empty_totals()
    step(state, totals, None, *data, epoch_order(state, count=32, steps_per_epoch=4))
    assert kernel.is_deleted()
    assert not data[0].is_deleted()


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order():
    _, state, *_ = _problem()
    first = epoch_order(state, count=32, steps_per_epoch=4)
    second = epoch_order(state.replace(step=jnp.int32(4)), count=32, steps_per_epoch=4)
    np.testing.assert_array_equal(np.sort(first), np.arange(32))
    np.testing.assert_array_equal(np.sort(second), np.arange(32))
    assert np.any(np.asarray(first) != np.asarray(second))
    np.testing.assert_array_equal(first, epoch_order(state, count=32, steps_per_epoch=4))


def test_the_steps_of_an_epoch_take_its_batches_one_after_the_other_with_different_keys():
    _, state, *_ = _problem()
    order = epoch_order(state, count=32, steps_per_epoch=4)

    def note(state, batch, key, bits):
        sums = {"loss": jnp.sum(batch[1] ** 2).astype(jnp.float32), "correct": jax.random.uniform(key)}
        sums |= {"count": jnp.sum(batch[0]).astype(jnp.float32), "collapsed_clips": jnp.float32(0)}
        return state.replace(step=state.step + 1), sums

    step = make_epoch_step(note, make_select(steps_per_epoch=4, batch_size=8))
    labels = np.arange(32)
    expected, drawn = np.asarray(order).reshape(4, 8), []
    totals = empty_totals()
    for batch in expected:
        before = jax.device_get(totals)
        state, totals = step(state, totals, None, jnp.ones((32, 1, 1, 1), jnp.uint8), jnp.asarray(labels), order)
        assert float(totals["loss"]) - before["loss"] == np.sum(labels[batch] ** 2)  # small integers: exact
        drawn.append(float(totals["correct"]) - before["correct"])
    assert float(totals["count"]) == 32
    assert len(set(drawn)) == 4


def test_batch_statistics_are_carried_by_the_state():
    _, state, step, data, _ = _problem()
    before = np.asarray(state.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    after, *_ = step(state, empty_totals(), None, *data, epoch_order(state, count=32, steps_per_epoch=4))
    assert np.any(before != np.asarray(after.model_state["batch_stats"]["BatchNorm_0"]["mean"]))


# Guards


class Fragile(nn.Module):
    """Two blocks and a head, each of which can be made to break down by its parameter."""

    @nn.compact
    def __call__(self, x, *, train=False, bits=None, return_states=False):
        x = x.reshape(x.shape[0], -1)
        states = []
        for name in ("stage0", "stage1"):
            gain = self.param(name, lambda _: {"gain": jnp.ones(()), "act_clips": jnp.full(2, 3.0)})
            # A root at zero: finite itself, infinite slope.
            x = x * gain["gain"] + jnp.sqrt(jnp.maximum(gain["act_clips"][0] - 3.0, 0.0))
            states.append(x)
        logits = nn.Dense(3, name="head")(x)
        return (logits, tuple(states)) if return_states else logits


def _fragile(harm):
    """The jitted step of `Fragile`, a state after harm(params), and what explains its breakdown."""
    model, optimizer = Fragile(), optax.sgd(0.1)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 4, 4, 1)))
    loss, select = make_loss(model, Loss()), make_select(steps_per_epoch=4, batch_size=8)
    prepare = lambda key, x, labels: (_normalize(x), jax.nn.one_hot(labels, 3))  # noqa: E731
    step = make_epoch_step(make_train_step(loss, optimizer, prepare), select)
    explain = make_explain(model, loss, prepare, lambda key, bits: bits)
    state = create_state({"params": harm(variables["params"])}, optimizer, jax.random.key(1))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (32, 4, 4, 1)), jnp.uint8)
    data = (images, jnp.zeros(32, jnp.int32), epoch_order(state, count=32, steps_per_epoch=4))
    return state, step, data, lambda state: explain(state, *select(state, *data), None)


def _with(params, stage, **values):
    return params | {stage: params[stage] | {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}}


@pytest.mark.parametrize(
    ("harm", "explanation"),
    [
        (lambda p: _with(p, "stage1", gain=np.inf), "the output of block 1 (first"),
        (lambda p: p | {"head": p["head"] | {"bias": jnp.full(3, jnp.nan)}}, "the logits (first"),
        (lambda p: p, "the gradient of stage1/act_clips not finite, as 2 in all"),
    ],
)
def test_a_step_that_breaks_down_changes_nothing_and_names_the_place_and_the_clips(harm, explanation):
    state, step, data, explain = _fragile(harm)
    before, totals = jax.tree.map(np.array, (state.step, state.params, state.opt_state)), empty_totals()
    for _ in range(2):
        state, totals = step(state, totals, None, *data)
    assert totals["broken"]
    assert float(totals["count"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, (state.step, state.params, state.opt_state))
    message = explain(state)
    assert explanation in message
    assert "stage0/act_clips [3. 3.]; stage1/act_clips [3. 3.]" in message


def test_after_a_broken_step_a_good_one_changes_nothing_either():
    state, step, data, _ = _fragile(
        lambda p: _with(_with(p, "stage0", act_clips=[4.0, 3.0]), "stage1", act_clips=[4, 3])
    )
    params = jax.tree.map(np.array, state.params)
    state, totals = step(state, empty_totals() | {"broken": jnp.bool_(True)}, None, *data)
    assert totals["broken"]
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    state, totals = step(state, empty_totals(), None, *data)
    assert not totals["broken"]
    assert int(state.step) == 1


def test_a_clip_that_collapses_is_raised_and_counted_and_no_other_parameter_is():
    params = {
        "stage0": {"act_clips": jnp.array([[1.0, -0.5], [0.0, 2.0]]), "kernel": jnp.array([-1.0])},
        "weight_clips": jnp.array([SMALLEST_CLIP]),
    }
    held, count = jax.jit(hold)(params, {})
    np.testing.assert_array_equal(held["stage0"]["act_clips"], np.float32([[1.0, SMALLEST_CLIP], [SMALLEST_CLIP, 2.0]]))
    assert float(held["stage0"]["kernel"][0]) == -1.0
    assert float(count) == 2
    assert set(clips_of(params)) == {"stage0/act_clips", "weight_clips"}
    assert float(hold({"kernel": jnp.zeros(3)}, {})[1]) == 0


def test_parameters_are_projected_onto_their_ranges_and_what_is_not_finite_is_left_to_be_seen():
    params = {"a": {"gamma2": jnp.array([-1.0, 0.01, 2.0, jnp.nan, jnp.inf])}, "b": {"gamma2": jnp.array([3.0])}}
    held, count = jax.jit(lambda params: hold(params, {"a/gamma2": (0.0, 0.025)}))(params)
    np.testing.assert_array_equal(held["a"]["gamma2"], np.float32([0, 0.01, 0.025, np.nan, np.inf]))
    assert float(held["b"]["gamma2"][0]) == 3
    assert float(count) == 0  # of clips


# Evaluation


@pytest.mark.parametrize("batch_size", [4, 5, 7])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    model, state, _, (images, labels), _ = _problem()
    evaluate = make_evaluate(model, _normalize)
    split = Split(np.asarray(images), np.asarray(labels))
    scores = evaluate(state.variables, [stack_batches(split, batch_size)])
    whole = evaluate(state.variables, [(images[None], labels[None])])
    assert scores["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-6)
    assert scores["loss"] == pytest.approx(whole["loss"], rel=1e-5)


# Checkpoints


def test_checkpoints_keep_the_last_two_and_the_best_state(tmp_path):
    _, state, step, data, _ = _problem()
    states, quality = {}, {1: (0.5, 1.0), 2: (0.7, 0.9), 3: (0.7, 0.8), 4: (0.6, 0.1), 5: None, 6: None}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.last_step, checkpoints.best_step) == (0, 0)
        for number, scores in quality.items():
            state, *_ = _train(state, step, data, 1)
            checkpoints.save(number, state, scores and dict(zip(("accuracy", "loss"), scores, strict=True)))
            states[number] = jax.tree.map(np.asarray, state.params)
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.last_step, checkpoints.best_step) == (6, 3)
        assert checkpoints.damaged == []
        for number in (3, 5, 6):
            loaded = checkpoints.load(number, state)
            jax.tree.map(np.testing.assert_array_equal, loaded.params, states[number])
            assert int(loaded.step) == 4 * number
            assert loaded.key == state.key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]


def test_a_state_without_validation_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)})
        assert (checkpoints.last_step, checkpoints.best_step) == (1, 0)


def test_a_save_holds_the_state_as_it_was_though_the_next_steps_take_its_memory(tmp_path):
    """Saves go on in the background while the loop donates what they were given."""
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"large": jnp.zeros((1000, 1000)), "small": jnp.zeros(3)}
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 6):
            state = advance(state)
            checkpoints.save(number, state)
            for _ in range(10):
                state = advance(state)
            loaded = checkpoints.load(number, state)
            jax.tree.map(lambda leaf, n=number: np.testing.assert_array_equal(leaf, 11.0 * n - 10), loaded)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "unseal"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_counts(tmp_path, harm):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            scores = {"accuracy": 0.1 * number, "loss": 1.0}
            checkpoints.save(number, {"a": jnp.full(1000, number, jnp.float32)}, scores)
    for path in [path for path in (tmp_path / "2").rglob("*") if path.is_file()]:
        if harm == "flip" and path.parent.name == "d":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if harm == "truncate" and path.name == "metrics":
            path.write_bytes(path.read_bytes()[:5])
        if (harm == "remove" and path.name == "manifest.ocdbt") or (harm == "unseal" and path.name == "SHA256SUMS"):
            path.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.damaged == [tmp_path / "2.damaged"]
        assert (checkpoints.last_step, checkpoints.best_step) == (1, 1)
        np.testing.assert_array_equal(checkpoints.load(1, {"a": jnp.zeros(1000)})["a"], 1.0)
        checkpoints.save(2, {"a": jnp.zeros(1000)})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.damaged == []
        assert checkpoints.last_step == 2


@pytest.mark.parametrize("like", [{"a": jnp.zeros(4)}, {"b": jnp.zeros(3)}, {"a": jnp.zeros(3), "b": jnp.zeros(3)}])
def test_a_state_of_another_network_is_refused_and_stays(tmp_path, like):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(3)})
        with pytest.raises(CheckpointError, match="does not fit this network"):
            checkpoints.load(1, like)
        assert checkpoints.last_step == 1


# Memory


GLIBC = platform.libc_ver()[0] == "glibc"


def test_freed_memory_is_kept_where_the_c_library_is_glibc(monkeypatch):
    ask = "from train.host.allocator import keep_freed_memory; print(keep_freed_memory())"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == str(GLIBC)
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_blocks_larger_than_a_threads_heap_are_used_again():
    """80 MiB are 20480 pages; the first calls grow the heap, later ones find their pages in it."""
    program = """
import resource
from train.host.allocator import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp

f, x = jax.jit(lambda x: x + 1), jnp.zeros(20 * 2**20)
faults = [0]
for _ in range(30):
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(answer.stdout) < 2048
