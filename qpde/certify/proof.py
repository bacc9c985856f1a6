"""The proof itself: what follows from a chain of steps, their constants, and the states of a quantized run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qpde.certify.step_bounds import to_float64

__all__ = ["Certificate", "conclude", "jvp", "norms", "pair_norms", "proof"]


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` found, for N inputs, L steps and C classes.

    Of a segmentation network every pixel has a prediction: (N, H, W) takes the place of (N,), and (N, H, W, C) of
    (N, C). Below i is the quantized network's prediction. Arrays are of NumPy, in float64 but for the logits.

    Attributes:
      logits: Logits of the quantized network, (N, C). Where an activation lies between two levels to the last digit,
        another compiled program may round it the other way: what is certified is this evaluation.
      certified: Whether the twin provably predicts the same, a posteriori or a priori, (N,).
      bound: Bound of |(z_i - z_k) - (z_i - z_k of the twin)|, (N, C), 0 at k = i.
      certified_a_priori: Whether that follows from the clips and bits alone, (N,). Never for what is deployed.
      bound_a_priori: The bound from the clips and bits alone, (N, C). Infinite for what is deployed, whose arithmetic
        it does not cover.
      state_bound: Bound of |y_j - x_j|, (N, L).
      defect: Defect d_j, (N, L).
      lipschitz: Lipschitz constant L_j, (L,).
      estimate: The twin's logits at the candidate c, (N, C). They are not a bound.
      shares: Of a segmentation network, what the defect of each step adds to the bound of a pixel's last features, the
        mean over the pixels, (N, L).
    """

    logits: Float[Array | np.ndarray, "n *pixels c"]
    certified: Bool[Array | np.ndarray, "n *pixels"]
    bound: Float[Array | np.ndarray, "n *pixels c"]
    certified_a_priori: Bool[Array | np.ndarray, "n *pixels"]
    bound_a_priori: Float[Array | np.ndarray, "n *pixels c"]
    state_bound: Float[Array | np.ndarray, "n l"]
    defect: Float[Array | np.ndarray, "n l"]
    lipschitz: Float[Array | np.ndarray, " l"]
    estimate: Float[Array | np.ndarray, "n *pixels c"]
    shares: Float[Array | np.ndarray, "n l"] | None = None

    @property
    def prediction(self) -> Int[np.ndarray, "n *pixels"]:
        """Argmax of the quantized network's logits, (N,)."""
        return np.argmax(self.logits, axis=-1)

    @property
    def certified_fraction(self) -> float:
        """Share of the inputs, or of their pixels, that are certified; NaN where there are none."""
        return float(np.mean(self.certified)) if np.size(self.certified) else math.nan


jax.tree_util.register_dataclass(Certificate)


def proof(
    twin: Sequence[Callable[[Array], Array]],
    states: Sequence[Array],
    logits: Array,
    head: Callable[[Array], Array],
    lipschitz: Any,
    pair: Array,
    a_priori: Any,
    newton_steps: Any,
) -> Certificate:
    """The certificate of a chain of steps, in float64 and traced.

    Args:
      twin: B_j, the twin's steps.
      states: y_j, of the quantized network, from the common start on.
      logits: (N, C) of the quantized network.
      head: The twin's, from the last state to logits.
      lipschitz: (L,) L_j.
      pair: (N, C), by how much z_i - z_k of the twin's head moves at most when the last state moves by 1.
      a_priori: By how much the last state moves at most, for all inputs; infinite where nothing is known.
      newton_steps: Steps of Newton's method from the quantized network's states on. None: the candidate is the twin.
    """
    z, start = to_float64(logits), states[0]

    def newton_step(_, candidate):
        v, improved = jnp.zeros_like(start), [start]
        for step, entering, leaving in zip(twin, candidate, candidate[1:], strict=False):
            reached, v = jvp(step, entering, v)
            v = v + (leaving - reached)
            improved.append(leaving - v)
        return improved

    if newton_steps is None:
        candidate = reached = [start]
        for step in twin:
            reached.append(step(reached[-1]))
    else:
        candidate = jax.lax.fori_loop(0, newton_steps, newton_step, list(states))
        reached = [start, *(step(entering) for step, entering in zip(twin, candidate, strict=False))]
        candidate[-1] = reached[-1]  # without a defect in the last step, what is known needs no bound
    distance, defects, bounds = jnp.zeros(len(z)), [], []
    for j in range(len(twin)):
        defects.append(norms(candidate[j + 1] - reached[j + 1]))
        distance = lipschitz[j] * distance + defects[-1]
        bounds.append(distance + norms(states[j + 1] - candidate[j + 1]))

    return conclude(
        logits,
        head(candidate[-1]),
        pair,
        distance,
        a_priori,
        state_bound=_columns(bounds, len(z)),
        defect=_columns(defects, len(z)),
        lipschitz=lipschitz,
    )


def conclude(logits: Array, estimate: Array, pair: Array, distance: Array, a_priori: Any, **found: Any) -> Certificate:
    """The certificate that follows from how far the last state may be from the twin's, in float64 and traced.

    Args:
      logits: (..., C) of the quantized network.
      estimate: (..., C), the twin's logits at the candidate.
      pair: (..., C), as for `proof`.
      distance: (...), by how much what gives these logits may be away from the candidate.
      a_priori: As for `proof`.
      **found: The other fields of the certificate.
    """
    z = to_float64(logits)
    prediction = jnp.argmax(z, axis=-1)
    rest = pair * distance[..., None]
    margin, margin_estimate = (_margins(v, prediction) for v in (z, estimate))
    others = jax.nn.one_hot(prediction, z.shape[-1], dtype=jnp.int32) == 0
    a_priori = jnp.where(others, jnp.where(jnp.isinf(a_priori), jnp.inf, pair * a_priori), 0.0)
    certified_a_priori = jnp.all((margin > a_priori) | ~others, axis=-1)
    return Certificate(
        logits=logits,
        certified=jnp.all((margin_estimate > rest) | ~others, axis=-1) | certified_a_priori,
        bound=jnp.abs(margin - margin_estimate) + rest,
        certified_a_priori=certified_a_priori,
        bound_a_priori=a_priori,
        estimate=estimate,
        **found,
    )


def pair_norms(kernel: Array, prediction: Array) -> Array:
    """|w_i - w_k| of a kernel (C, classes), for every prediction i and all k: (..., classes)."""
    return jnp.linalg.norm(kernel[:, :, None] - kernel[:, None, :], axis=0)[prediction]


def _margins(logits, prediction):
    """z_i - z_k of every input, i its prediction."""
    return jnp.take_along_axis(logits, prediction[..., None], axis=-1) - logits


def norms(x):
    """The norm of each array of a batch."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def jvp(f, x, v):
    """f(x) and J v, by the vjp of the vjp: custom_vjp rules out forward mode."""
    y, pullback = jax.vjp(f, x)
    _, transposed = jax.vjp(lambda u: pullback(u)[0], jnp.zeros_like(y))
    return y, transposed(v)[0]


def _columns(found, count):
    return jnp.stack(found, axis=1) if found else jnp.zeros((count, 0))
