"""Learning rates over a run: functions from the number of steps done, () int32, to the rate, () float32."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

# Smith and Topin (2018): 3/10 of the steps up from peak/25, the others down to peak/250,000.
_RISING_PART, _START, _END = 0.3, 1 / 25, 1 / 250_000


def one_cycle(peak: float, steps: int) -> Schedule:
    """Rise along half a cosine from peak/25 to `peak` in 3/10 of the steps, then fall to nearly nothing.

    `optax.cosine_onecycle_schedule` rounds 3/10 of the steps down, which moves the peak of a short run.
    """
    top = _RISING_PART * steps
    from_top = optax.cosine_decay_schedule(peak, top, alpha=_START)
    down = optax.cosine_decay_schedule(peak, steps - top, alpha=_END)

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        done = step.astype(jnp.float32)
        return jnp.where(done < top, from_top(top - done), down(done - top))

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
