"""What training carries from step to step, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree


class TrainState(flax.struct.PyTreeNode):
    """Everything that a resumed run needs: with the same data, the steps that follow are determined by it.

    Attributes:
      step: () int32, training steps done.
      params: trained by gradients.
      model_state: every other variable collection of the model, such as batch statistics.
      opt_state: of the optimizer.
      key: constant; each step and each epoch derives its own from it.
    """

    step: Int[Array, ""]
    params: PyTree
    model_state: dict[str, Any]
    opt_state: PyTree
    key: Key[Array, ""]

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, **self.model_state}


def create_state(variables: dict[str, Any], optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """The state before the first step, from the variables of `model.init`."""
    variables = jax.tree.map(jnp.asarray, dict(variables))
    params = variables.pop("params")
    return TrainState(jnp.int32(0), params, variables, optimizer.init(params), key)
