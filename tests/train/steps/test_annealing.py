"""Bits and smoothing over the epochs, and bits that are drawn for every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpde.bits import Bits
from train.config.images import Annealing, BitSchedule, Experiment, Model, SmoothingSchedule, Variant
from train.config.recipes import any_bit
from train.steps.annealing import bits_of, is_annealed, make_draw, smoothing_scale_of
from train.steps.state import RANDOM


def test_each_schedule_is_its_formula_weights_and_activations_apart():
    annealing = Annealing(BitSchedule("staircase", start=6, every=2), BitSchedule("listed", every=3, bits=(16, 8)))
    widths = bits_of(annealing, Bits(4, 3), 10)
    assert [widths(epoch).weights for epoch in range(1, 11)] == [6, 6, 5, 5, 4, 4, 4, 4, 4, 4]
    assert [widths(epoch).activations for epoch in range(1, 11)] == [16, 16, 16, 8, 8, 8, 3, 3, 3, 3]
    assert bits_of(Annealing(), Bits(None, 4), 1)(1) == Bits(None, 4)


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
        assert bits_of(annealing, target, 10)(1).weights == 4
    else:
        with pytest.raises(ValueError, match=message):
            bits_of(annealing, target, 10)


def test_smoothing_rises_or_falls_in_equal_steps():
    rise, fall = (smoothing_scale_of(SmoothingSchedule(name, 4), smooths=True, epochs=6) for name in ("rise", "fall"))
    assert [rise(epoch) for epoch in range(1, 7)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [fall(epoch) for epoch in range(1, 7)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert smoothing_scale_of(SmoothingSchedule(), smooths=False, epochs=0)(1) is None
    with pytest.raises(ValueError, match="nothing to schedule: give the recipe's model smoothing"):
        smoothing_scale_of(SmoothingSchedule("fall", 4), smooths=False, epochs=6)
    with pytest.raises(ValueError, match=r"annealing.smoothing.epochs \(=4\) leaves none of 4 epochs"):
        smoothing_scale_of(SmoothingSchedule("rise", 4), smooths=True, epochs=4)


def test_random_widths_are_all_drawn_alike_from_the_key_alone_and_validated_at_the_models_own():
    annealing = Annealing(weights=BitSchedule("random", bits=(2, 8)))
    assert not is_annealed(annealing)
    assert [bits_of(annealing, Bits(4, 3), 9)(epoch) for epoch in (1, 9)] == [Bits(4, 3)] * 2
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
    recipe = any_bit(Experiment("example", (Variant("own"),), model=Model(weight_bits=4, act_bits=4)), name="any")
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


def test_without_random_schedules_the_bits_of_a_step_are_those_given():
    draw = make_draw(Annealing(activations=BitSchedule("listed", bits=(8,))), Bits(4, 4))
    assert draw(jax.random.key(0), None) is None
    assert draw(jax.random.key(0), Bits(4, 8)) == Bits(4, 8)
