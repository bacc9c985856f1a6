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

A certificate costs more than the twin itself, and as many Newton steps as the network has steps end at the twin: what
one of few Newton steps adds to the twin's own prediction is why it is the same. Errors were small, they did not grow, and they add up as the
Jacobians carry them.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qpde import operators
from qpde.bits import Bits
from qpde.certify.step_bounds import StepBound, at_block, check_model, in_float64, rounded, step_bounds, to_float64
from qpde.models.images.network import Network
from qpde.models.layers import NORM_EPSILON, Mode, divide_by_rms, normalize

__all__ = ["Certificate", "certify", "exact_twin"]


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What `certify` found, for N inputs, L steps and C classes; i is the quantized network's prediction. NumPy arrays,
    of float64 but for the logits.

    Attributes:
      logits: (N, C) of the quantized network. Where an activation lies between two levels to the last digit, another
        compiled program may round it the other way: what is certified is this evaluation.
      certified: (N,) whether the twin provably predicts the same.
      bound: (N, C) of |(z_i - z_k) - (z_i - z_k of the twin)|, 0 at k = i.
      certified_a_priori, bound_a_priori: the same from the clips and bits alone.
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
        """Share of the inputs that are certified."""
        return float(np.mean(self.certified))


def certify(
    model: Network,
    variables: dict,
    x: Float[Array | np.ndarray, "n h w c"],
    bits: Bits,
    *,
    newton_steps: int = 2,
    steps: "list[StepBound] | None" = None,
) -> Certificate:
    """The certificate of a quantized image network on a batch of inputs.

    Args:
      model: of `qpde.models.create`.   variables: its collections.   x: images.
      bits: widths, scalars or one for each block; activations must have one.
      newton_steps: of Newton's method, 0 for the injected errors as they are.
      steps: of `step_bounds`, which takes seconds, for who certifies several batches; None finds them.
    Returns:
      `Certificate`.
    Raises:
      ValueError: no width for activations, a negative number of newton_steps, not an image network, one with clips for
        each width (`Network.at_bits` makes an ordinary one of it), one that computes in bfloat16, or one that smooths
        by a kind that is not convex.
    """
    if not isinstance(model, Network):
        raise ValueError(f"certificates are for image networks; got {type(model).__name__}")
    if bits.activations is None:
        raise ValueError("`bits.activations` (=None) rounds nothing: give a width, for instance qpde.Bits(4, 8)")
    if newton_steps < 0:
        raise ValueError(f"`newton_steps` (={newton_steps}) must be at least 0")
    check_model(model)
    x = jnp.asarray(x)
    bits = model.checked_bits(bits)
    steps = step_bounds(model, variables, x.shape[1:3], bits) if steps is None else steps
    a_priori = 0.0
    for step in steps:
        a_priori = step.lipschitz * a_priori + step.injected
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors of products to fewer bits
        run, rounded = _run(model, variables, x, bits), _rounded_steps(model, variables, bits)
    with in_float64():
        lipschitz = np.array([step.lipschitz for step in steps])
        found = _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, np.int32(newton_steps))
        return jax.device_get(found)


def exact_twin(
    model: Network, variables: dict, x: Float[Array | np.ndarray, "n h w c"], bits: Bits
) -> Float[np.ndarray, "n classes"]:
    """Logits of the twin that a certificate speaks of, computed in float64.

    Args:
      model, variables, x, bits: as for `certify`.
    Raises:
      ValueError: a network with clips for each width, or one that computes in bfloat16.
    """
    check_model(model)
    bits = model.checked_bits(bits)
    rounded = _rounded_steps(model, variables, bits)
    with in_float64():
        return np.asarray(_exact_twin(model, variables, rounded, jnp.asarray(x), bits))


@partial(jax.jit, static_argnames="model")
def _run(model, variables, x, bits):
    """Logits and states of the quantized network as it runs, the stem's first."""
    states = [_stem(model, variables, x)]
    for index, (block, own, step_size, gamma2) in enumerate(model.steps(variables)):
        states.append(block(own, states[-1], step_size, at_block(bits, index), Mode(), gamma2)[0])
    return _logits(model, variables, states[-1]), states


@partial(jax.jit, static_argnames="model")
def _rounded_steps(model, variables, bits):
    """Of every step its variables, the kernels rounded, and gamma2."""
    return [
        (rounded(block, own, step_size, at_block(bits, index)), gamma2)
        for index, (block, own, step_size, gamma2) in enumerate(model.steps(variables))
    ]


@partial(jax.jit, static_argnames="model")
def _exact_twin(model, variables, rounded, x, bits):
    variables = to_float64(variables)
    y = _stem(model, variables, to_float64(x))
    for step in _twin_steps(model, variables, rounded, bits):
        y = step(y)
    return _logits(model, variables, y)


@partial(jax.jit, static_argnames="model")
def _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, newton_steps):
    (logits, states), variables = run, to_float64(variables)
    z, states = to_float64((logits, states))
    start = _stem(model, variables, to_float64(x))
    twin = _twin_steps(model, variables, rounded, bits)

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

    estimate = _logits(model, variables, candidate[-1])
    prediction = jnp.argmax(z, axis=-1)
    gain, pair = _head_norms(model, variables, states[-1].shape, prediction)
    rest = pair * (gain * distance)[:, None]
    margin, margin_estimate = (_margins(v, prediction) for v in (z, estimate))
    a_priori = pair * (gain * a_priori)
    others = jnp.arange(z.shape[-1])[None] != prediction[:, None]
    return Certificate(
        logits=logits,
        certified=jnp.all((margin_estimate > rest) | ~others, axis=-1),
        bound=jnp.abs(margin - margin_estimate) + rest,
        certified_a_priori=jnp.all((margin > a_priori) | ~others, axis=-1),
        bound_a_priori=a_priori,
        state_bound=jnp.stack(bounds, axis=1),
        defect=jnp.stack(defects, axis=1),
        lipschitz=lipschitz,
        estimate=estimate,
    )


jax.tree_util.register_dataclass(Certificate)


def _twin_steps(model, variables, rounded, bits):
    """The twin's steps B_j as functions of a state, in float64."""
    mode = Mode(compute_dtype="float64")

    def step(block, step_size, own, gamma2, widths, y):
        return block(own, y, step_size, widths, mode, gamma2)[0]

    found = []
    for index, (block, _, step_size, _) in enumerate(model.steps(variables)):
        widths = Bits(None, at_block(bits.twin, index).activations)
        found.append(partial(step, block, step_size, *to_float64(rounded[index]), widths))
    return found


def _stem(model, variables, x):
    params, norm = variables["params"], variables["batch_stats"]["stem_norm"]
    y = normalize(operators.conv(x, params["stem_kernel"]), params["stem_norm"], norm["mean"], norm["var"])
    return jax.nn.relu(y)


def _logits(model, variables, y):
    """Neck if there is one, pooling, dense head."""
    params, stats = variables["params"], variables["batch_stats"]
    if model.neck_width is not None:
        norm = stats["neck_norm"]
        y = normalize(operators.conv(y, params["neck_kernel"]), params["neck_norm"], norm["mean"], norm["var"])
        y = jax.nn.relu(y)
    pooled = y.mean((1, 2))
    if model.head == "scaled":
        pooled = divide_by_rms(pooled, stats["pooled"]["mean_square"])
    return pooled @ params["head"]["kernel"] + params["head"]["bias"][None]


def _head_norms(model, variables, shape, prediction) -> tuple[Any, Array]:
    """Lipschitz constant from the last state to the pooled features, and |w_i - w_k| for every input's i."""
    params, stats = variables["params"], variables["batch_stats"]
    gain = 1 / math.sqrt(shape[1] * shape[2])
    if model.neck_width is not None:
        norm = params["neck_norm"]["scale"] * jax.lax.rsqrt(stats["neck_norm"]["var"] + NORM_EPSILON)
        gain = gain * jnp.linalg.norm(params["neck_kernel"][0, 0] * norm[None], 2)
    if model.head == "scaled":
        gain = divide_by_rms(jnp.asarray(gain), stats["pooled"]["mean_square"])
    w = params["head"]["kernel"]
    return gain, jnp.linalg.norm(w[:, prediction].T[:, :, None] - w[None], axis=1)


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
