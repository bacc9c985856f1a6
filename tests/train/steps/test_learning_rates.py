"""Learning rates: the closed forms, at every step of runs of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.steps.learning_rates import SCHEDULES


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
