"""What training carries from step to step, as one pytree."""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from train.steps import twin_clips

RANDOM = "rbg"
"""Generator of a run's keys: XLA's own, which compiles faster than JAX's default one."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that a resumed run needs: with the same data, the steps that follow are determined by it.

    Attributes:
      step: () int32, training steps done.
      params: trained by gradients; of a distilled network with the twin's clips (`train.steps.twin_clips`).
      model_state: every other variable collection of the model, such as batch statistics.
      opt_state: State of the optimizer.
      averages: moving averages of {"params", "model_state"}, or None.
      key: constant; each step and each epoch derives its own from it.
    """

    step: Int[Array, ""]
    params: PyTree
    model_state: dict[str, Any]
    opt_state: PyTree
    averages: PyTree
    key: Key[Array, ""]

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": twin_clips.low(self.params), **self.model_state}

    @property
    def twin_variables(self) -> dict[str, Any] | None:
        """The same for the high-precision twin, None if it has no clips of its own."""
        return (
            {"params": twin_clips.high(self.params), **self.model_state} if twin_clips.has_twin(self.params) else None
        )

    @property
    def averaged(self) -> Self:
        """The state to evaluate: with the averages in place of what they are averages of, where there are any."""
        return self if self.averages is None else self.replace(**self.averages)


def create_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    averaging: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
      variables: Variables of `model.init`, perhaps with the twin's clips.
      optimizer, key: of the run.
      averaging: keep moving averages.
    """
    # Copies, because the twin's clips start as the network's own and the step donates each leaf.
    model_state = jax.tree.map(jnp.array, dict(variables))
    params = model_state.pop("params")
    averages = jax.tree.map(jnp.copy, {"params": params, "model_state": model_state}) if averaging else None
    return TrainState(jnp.int32(0), params, model_state, optimizer.init(params), averages, key)


def update_averages(state: TrainState, keep: float) -> TrainState:
    """The state with its averages a <- k a + (1 - k) value, k = min(keep, (1 + t) / (10 + t)) after t steps.

    So the first steps, far from where the training ends, are soon forgotten.
    """
    steps = state.step.astype(jnp.float32)
    kept = jnp.minimum(keep, (1 + steps) / (10 + steps))
    values = {"params": state.params, "model_state": state.model_state}
    return state.replace(averages=jax.tree.map(lambda a, v: a + (1 - kept) * (v - a), state.averages, values))
