"""Learning rates: the closed forms, at every step of runs of any length."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.steps.learning_rates import SCHEDULES, cosine, one_cycle


def _half_cosine(start, end, part):
    return end + (start - end) * (1 + np.cos(np.pi * np.clip(part, 0, 1))) / 2


def _one_cycle(peak, done):
    rising, falling = _half_cosine(peak / 25, peak, done / 0.3), _half_cosine(peak, peak / 250_000, (done - 0.3) / 0.7)
    return np.where(done < 0.3, rising, falling)


CLOSED_FORMS = {
    "one_cycle": _one_cycle,
    "cosine": lambda peak, done: _half_cosine(peak, 0.0, done),
    "constant": lambda peak, done: np.full_like(done, peak),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("steps", [1, 5, 7, 15, 100, 78_200])
def test_every_rate_is_the_closed_form_to_float32(name, steps):
    """Three tenths of 5, 7 and 15 steps are no whole steps: the peak is not moved to one."""
    step = np.unique(np.linspace(0, steps, 2001).astype(np.int32))
    rates = jax.jit(SCHEDULES[name](0.1, steps))(jnp.asarray(step))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, CLOSED_FORMS[name](0.1, step / steps), rtol=0, atol=5e-8)


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
