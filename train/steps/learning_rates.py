"""Learning rates over a run: functions from the number of steps done, () int32, to the rate, () float32."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

# Smith and Topin (2018): 3/10 of the steps up from peak/25, the others down to peak/250,000.
_RISING_PART, _START, _END = 0.3, 1 / 25, 1 / 250_000


def one_cycle(peak: float, steps: int) -> Schedule:
    """Rise along half a cosine from peak/25 to `peak` in 3/10 of the steps, then fall to nearly nothing."""
    # optax.cosine_onecycle_schedule rounds 3/10 of the steps down, which moves the peak of a short run; and its other
    # last digits, which training magnifies, would change every published number.

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        done = step.astype(jnp.float32) / steps
        rising = _half_cosine(_START * peak, peak, done / _RISING_PART)
        falling = _half_cosine(peak, _END * peak, (done - _RISING_PART) / (1 - _RISING_PART))
        return jnp.where(done < _RISING_PART, rising, falling)

    return schedule


def cosine(peak: float, steps: int) -> Schedule:
    """peak (1 + cos(pi t / steps)) / 2, the published schedule (Loshchilov and Hutter, 2017, no restarts)."""
    schedule = optax.cosine_decay_schedule(peak, steps)
    return lambda step: schedule(step.astype(jnp.float32))


def constant(peak: float, steps: int) -> Schedule:
    """peak, for tuning a trained network."""
    return lambda step: jnp.full_like(step, peak, jnp.float32)


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
    "constant": constant,
}


def _half_cosine(start: float, end: float, part: Float[Array, ""]) -> Float[Array, ""]:
    """From `start` at part 0 to `end` at part 1, flat at both and held outside."""
    return end + (start - end) * (1 + jnp.cos(math.pi * jnp.clip(part, 0, 1))) / 2
