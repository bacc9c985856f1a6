"""A certificate: inputs whose prediction the rounding of activations provably does not change.

The twin of a quantized network is the same network, weights rounded, activations clipped but not rounded. With B_j its
steps, x_j = B_j(x_{j-1}) its states and L_j a Lipschitz constant of B_j, any other states c_j that start at c_0 = x_0
keep to them within

    |x_j - c_j| <= E_j = L_j E_{j-1} + d_j,   E_0 = 0,   d_j = |c_j - B_j(c_{j-1})|         the defect of c at step j.

A posteriori, c starts as the quantized network's own states y_j, whose defects are the errors that rounding injects,
and is improved by steps of Newton's method on c_j = B_j(c_{j-1}), with J_j the Jacobian of B_j at c_{j-1}:

    c_j <- c_j - v_j,   v_j = J_j v_{j-1} + c_j - B_j(c_{j-1}),   v_0 = 0.

The first step carries the errors on as a linear network would, with their signs; what is left of the defects are the
ReLUs and clips that switch between y and c. So the proof is no longer that of the worst direction in every step.

The logits' difference z_i - z_k is w_i - w_k applied to the mean over HW pixels: a last state within E moves it by at
most |w_i - w_k| E / sqrt(HW). A priori, d_j follows from the clips and bits, with c = y, and the bound holds for every
input at once.

y is what the quantized network computes in float32. All about the twin, its steps B_j, the constants, the candidate and
its defects, is computed in float64, since the constants magnify rounding too: behind plain steps float32 alone would
spoil a bound at 8 bits, and prove nothing. What is left, some 1e-16 of the states times the constants, is not counted.
Where an accelerator has no float64, certify under `jax.default_device` of a CPU.

The constants are proven, not estimated (`qpde.conv_norms`). They are those of the network as it runs, so its spectral
norms should have converged, see `qpde.models.converge_norms`:

    tied, spectral      max(1, h |A|^2 - 1), A = D K: the step is a gradient step on a convex energy, so 1 up to 2
    separate norms      1 + h |D2 K^T| |D1 K|; neither symmetric nor a gradient, and no better constant is proven
    plain               |shortcut| + |D2 K2| |D1 K1|
    growing, pooling    sqrt(L^2 + 1) for the copied channels, times 1/2, the norm of a 2x2 mean
    clip, ReLU, convex smoothing within its stable range    1; a step of another kind can amplify, and is refused

What is deployed is certified alike: the candidate then starts as the states of the integer program, and i is the class
that its logits name. Nothing is assumed of how they came about. So the defects hold every rounding there is: codes,
requantizations in float32, thresholds that were settled, kernels of stem, neck and head in 8 bits, a flipped code.

A certificate costs more than the twin itself, and as many Newton steps as the network has blocks end at the twin: what
few of them add to the twin's own prediction is why it is the same. Errors were small, they did not grow, and they add
up as the Jacobians carry them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qpde.batches import Batch, read_batch
from qpde.bits import Bits
from qpde.certify.step_bounds import (
    StepBounds,
    check_model,
    exact_factors,
    in_float64,
    rounded,
    step_bounds,
    to_float64,
)
from qpde.models.images.network import Network
from qpde.models.images.parts import Head
from qpde.models.layers import Mode

__all__ = ["Certificate", "certify", "exact_twin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` found, for N inputs, L steps and C classes; i is the quantized network's prediction. NumPy arrays,
    of float64 but for the logits.

    Attributes:
      logits: (N, C) of the quantized network. Where an activation lies between two levels to the last digit, another
        compiled program may round it the other way: what is certified is this evaluation.
      certified: (N,) whether the twin provably predicts the same, a posteriori or a priori.
      bound: (N, C) of |(z_i - z_k) - (z_i - z_k of the twin)|, 0 at k = i.
      certified_a_priori, bound_a_priori: the same from the clips and bits alone. Never and infinite for what is
        deployed, whose arithmetic they do not cover.
      state_bound: (N, L) of |y_j - x_j|.   defect: (N, L) d_j.   lipschitz: (L,) L_j.
      estimate: (N, C) of the twin's logits, those of the candidate c. They are not a bound.
    """

    logits: Float[Array | np.ndarray, "n c"]
    certified: Bool[Array | np.ndarray, " n"]
    bound: Float[Array | np.ndarray, "n c"]
    certified_a_priori: Bool[Array | np.ndarray, " n"]
    bound_a_priori: Float[Array | np.ndarray, "n c"]
    state_bound: Float[Array | np.ndarray, "n l"]
    defect: Float[Array | np.ndarray, "n l"]
    lipschitz: Float[Array | np.ndarray, " l"]
    estimate: Float[Array | np.ndarray, "n c"]

    @property
    def prediction(self) -> Int[np.ndarray, " n"]:
        """Argmax of the quantized network's logits, (N,)."""
        return np.argmax(self.logits, axis=-1)

    @property
    def certified_fraction(self) -> float:
        """Share of the inputs that are certified; NaN where there are none."""
        return float(np.mean(self.certified)) if len(self.certified) else math.nan


def certify(
    model: Network,
    variables: Mapping[str, Any],
    x: Batch,
    bits: Bits,
    *,
    newton_steps: int = 2,
    steps: StepBounds | None = None,
    deployed: tuple[Any, Sequence[Any]] | None = None,
) -> Certificate:
    """The certificate of a quantized image network on a batch of inputs.

    Args:
      model: Network of `qpde.models.create`.
      variables: Its collections.
      x: Images (N, H, W, C), or a pair of these and labels, which are not used.
      bits: Scalars, or one value for each block. Activations must have bits.
      newton_steps: Steps of Newton's method. 0 takes the injected errors as they are.
      steps: Result of `step_bounds`, which takes seconds, for this network, these variables, this image size and these
        bits. Pass it when certifying several batches. Default: computed.
      deployed: Logits (N, C) and states of what is deployed, for these images: the outputs of the stem and of every
        block, as `qpde.deploy.run(folded, return_states=True)` makes them. They may be those of any program: what is
        certified is that the twin predicts the class of the largest of these logits, and other states only make the
        bound worse. Default: those of the network itself.
    Returns:
      `Certificate`, in which the quantized network is what is deployed.
    Raises:
      ValueError: No bits for activations; a negative number of Newton steps; constants of something else; `deployed` of
        other shapes; not an image network, one with clips for each of several bits (`Network.at_bits` makes an ordinary
        one of it), one that computes in bfloat16, or one that smooths by a kind that is not convex.
    """
    if not isinstance(model, Network):
        raise ValueError(f"certificates are for image networks; got {type(model).__name__}")
    if bits.activations is None:
        raise ValueError("`bits.activations` (=None) rounds nothing: give a width, for instance qpde.Bits(4, 8)")
    if newton_steps < 0:
        raise ValueError(f"`newton_steps` (={newton_steps}) must be at least 0")
    check_model(model)
    x = jnp.asarray(read_batch(x, variables))
    bits = model.checked_bits(bits)
    size = (x.shape[1], x.shape[2])
    if steps is None:
        steps = step_bounds(model, variables, size, bits)
    else:
        steps.check(model, variables, size, bits)
    a_priori = 0.0
    for step in steps.bounds:
        a_priori = step.lipschitz * a_priori + step.injected
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors of products to fewer bits
        if deployed is None:
            run = _run(model, variables, x, bits)
        else:
            run, a_priori = _checked_run(model, variables, x, bits, deployed), np.inf
        rounded = _rounded_parts(model, variables, bits)
    gain = _tail_gain(model, variables, run[1][-1].shape[1:3])
    with in_float64():
        lipschitz = np.array([step.lipschitz for step in steps.bounds])
        found = _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, gain, np.int32(newton_steps))
        return jax.device_get(found)


def exact_twin(model: Network, variables: Mapping[str, Any], x: Batch, bits: Bits) -> Float[np.ndarray, "n classes"]:
    """Logits of the twin that a certificate speaks of, computed in float64.

    Args:
      model: Network, as for `certify`.
      variables: Its collections.
      x: Images (N, H, W, C).
      bits: Bits, as for `certify`.
    Raises:
      ValueError: a network with clips for each width, or one that computes in bfloat16.
    """
    check_model(model)
    bits = model.checked_bits(bits)
    rounded = _rounded_parts(model, variables, bits)
    x = read_batch(x, variables)
    with in_float64():
        return np.asarray(_exact_twin(model, variables, rounded, jnp.asarray(x), bits))


@partial(jax.jit, static_argnames="model")
def _run(model, variables, x, bits):
    """Logits and states of the quantized network as it runs, the stem's first."""
    states = []
    for part in model.bound_parts(variables, bits):
        x = part(x, Mode())
        states.append(x)
    tail = len(states) - 1 - len(model.blocks)  # neck and head
    return x, states[:-tail]


def _checked_run(model, variables, x, bits, deployed):
    """The logits and states that were given, in the shapes that the network's own have."""
    logits, states = deployed
    given, needed = (logits, list(states)), jax.eval_shape(partial(_run, model), variables, x, bits)
    shapes = [[np.shape(v) for v in (run[0], *run[1])] for run in (given, needed)]
    if shapes[0] != shapes[1]:
        found = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), [len(v) for v in shapes])
        raise ValueError(
            f"`deployed` has values of shape {found[0]} where this network has {found[1]}: give the logits, then the "
            "outputs of the stem and of every block, qpde.deploy.run(folded, return_states=True)(x)"
        )
    return jax.tree.map(jnp.asarray, given)


@partial(jax.jit, static_argnames="model")
def _rounded_parts(model, variables, bits):
    """Of every part its variables, the kernels rounded, and gamma2."""
    return [
        (rounded(part, own, step_size, widths), gamma2)
        for part, own, step_size, gamma2, widths in model.bound_parts(variables, bits)
    ]


@partial(jax.jit, static_argnames="model")
def _exact_twin(model, variables, rounded, x, bits):
    y = to_float64(x)
    for part in _twin_parts(model, variables, rounded, bits):
        y = part(y)
    return y


@partial(jax.jit, static_argnames="model")
def _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, gain, newton_steps):
    logits, states = run
    z, states = to_float64((logits, states))
    stem, *twin = _twin_parts(model, variables, rounded, bits)
    twin, tail = twin[: len(model.blocks)], twin[len(model.blocks) :]
    start = stem(to_float64(x))

    def newton_step(_, candidate):
        v, improved = jnp.zeros_like(start), [start]
        for step, entering, leaving in zip(twin, candidate, candidate[1:], strict=False):
            reached, v = _jvp(step, entering, v)
            v = v + (leaving - reached)
            improved.append(leaving - v)
        return improved

    candidate = jax.lax.fori_loop(0, newton_steps, newton_step, [start, *states[1:]])
    candidate[-1] = twin[-1](candidate[-2])  # without a defect in the last step, what is known of it needs no bound
    distance, defects, bounds = jnp.zeros(len(x)), [], []
    for j, step in enumerate(twin):
        defects.append(_norms(candidate[j + 1] - step(candidate[j])))
        distance = lipschitz[j] * distance + defects[-1]
        bounds.append(distance + _norms(states[j + 1] - candidate[j + 1]))

    estimate = candidate[-1]
    for part in tail:
        estimate = part(estimate)
    prediction = jnp.argmax(z, axis=-1)
    pair = _pair_norms(to_float64(variables["params"]["head"]["kernel"]), prediction)
    rest = pair * (gain * distance)[:, None]
    margin, margin_estimate = (_margins(v, prediction) for v in (z, estimate))
    others = jnp.arange(z.shape[-1])[None] != prediction[:, None]
    a_priori = jnp.where(others, jnp.where(jnp.isinf(a_priori), jnp.inf, pair * (gain * a_priori)), 0.0)
    certified_a_priori = jnp.all((margin > a_priori) | ~others, axis=-1)
    return Certificate(
        logits=logits,
        certified=jnp.all((margin_estimate > rest) | ~others, axis=-1) | certified_a_priori,
        bound=jnp.abs(margin - margin_estimate) + rest,
        certified_a_priori=certified_a_priori,
        bound_a_priori=a_priori,
        state_bound=jnp.stack(bounds, axis=1),
        defect=jnp.stack(defects, axis=1),
        lipschitz=lipschitz,
        estimate=estimate,
    )


jax.tree_util.register_dataclass(Certificate)


def _twin_parts(model, variables, rounded, bits):
    """The twin's parts as functions of a state, in float64."""
    mode = Mode(compute_dtype="float64")
    parts = model.bound_parts(variables, Bits(None, bits.twin.activations))
    return [
        partial(part._replace(variables=to_float64(own), gamma2=to_float64(gamma2)), mode=mode)
        for part, (own, gamma2) in zip(parts, rounded, strict=True)
    ]


def _tail_gain(model, variables, size):
    """Lipschitz constant from the last block's output to what the dense layer takes."""
    gain = 1.0
    for bound in model.bound_parts(variables, Bits())[1 + len(model.blocks) :]:
        factors = exact_factors(bound)
        if isinstance(bound.part, Head):
            return gain * bound.part.feature_gain(factors, size)
        gain *= bound.part.step_bound(factors, Bits(), size).lipschitz


def _pair_norms(kernel, prediction):
    """|w_i - w_k| for every input's prediction i and all k."""
    return jnp.linalg.norm(kernel[:, prediction].T[:, :, None] - kernel[None], axis=1)


def _margins(logits, prediction):
    """z_i - z_k of every input, i its prediction."""
    return jnp.take_along_axis(logits, prediction[:, None], axis=-1) - logits


def _norms(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3)))


def _jvp(f, x, v):
    """f(x) and J v, by the vjp of the vjp: custom_vjp rules out forward mode."""
    y, pullback = jax.vjp(f, x)
    _, transposed = jax.vjp(lambda u: pullback(u)[0], jnp.zeros_like(y))
    return y, transposed(v)[0]
