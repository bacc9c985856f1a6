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

The constants are proven, not estimated (`qpde.kernel_norms`). They are those of the network as it runs, so its spectral
norms should have converged, see `qpde.models.converge_norms`:

    tied, spectral      max(1, h |A|^2 - 1), A = D K: the step is a gradient step on a convex energy, so 1 up to 2
    separate norms      1 + h |D2 K^T| |D1 K|; neither symmetric nor a gradient, and no better constant is proven
    plain               |shortcut| + |D2 K2| |D1 K1|
    growing, pooling    sqrt(L^2 + 1) for the copied channels, times 1/2, the norm of a 2x2 mean
    clip, ReLU, convex smoothing within its stable range    1; a step of another kind can amplify, and is refused

What is deployed is certified alike: the candidate then starts as the states of the integer program, and i is the class
that its logits name. Nothing is assumed of how they came about. So the defects hold every rounding there is: codes,
requantizations in float32, thresholds that were settled, kernels of stem, neck and head in 8 bits, a flipped code.

As many Newton steps as the network has blocks end at the twin. So the cheapest proof takes the twin's own states as the
candidate: the defects are 0, one run of the twin in float64 is all it costs, and every prediction that is the twin's is
proven. It does not say why. A few Newton steps do: errors were small, they did not grow, and they add up as the
Jacobians carry them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpde.batches import Batch, read_batch
from qpde.bits import Bits
from qpde.certify.chain import certify_chain, exact_chain
from qpde.certify.pixels import follow, pixel_proof, worst_case
from qpde.certify.proof import Certificate, pair_norms, proof
from qpde.certify.step_bounds import (
    StepBounds,
    check_model,
    in_float64,
    rounded_parts,
    step_bounds,
    to_float64,
)
from qpde.models.images.segmentation import SegmentationNetwork
from qpde.models.layers import Mode

__all__ = ["certify", "exact_twin"]


def certify(
    model: Any,
    variables: Mapping[str, Any],
    x: Batch,
    bits: Bits,
    *,
    newton_steps: int | None = None,
    steps: StepBounds | None = None,
    deployed: tuple[Any, Sequence[Any]] | None = None,
) -> Certificate:
    """The certificate of a quantized network on a batch of inputs.

    A segmentation network is certified pixel by pixel, see `qpde.certify.pixels`.

    Args:
      model: Image network of `qpde.models.create`, or a `qpde.nn.Chain` that `qpde.quantized` made a network of.
      variables: Its collections.
      x: Images (N, H, W, C), or what the chain takes, or a pair of these and labels, which are not used.
      bits: Scalars, or one value for each block, or quantized layer. Activations must have bits.
      newton_steps: Steps of Newton's method from the quantized network's states on: the proof then rests on the steps'
        constants. 0 takes the injected errors as they are. None: the candidate is the twin itself, which proves every
        prediction that is the twin's, for the least.
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
        other shapes; a network of which no constants are proven, one with clips for each of several bits
        (`Network.at_bits` makes an ordinary one of it), one that computes in bfloat16, or one that smooths by a kind
        that is not convex.
    """
    if bits.activations is None:
        raise ValueError("`bits.activations` (=None) rounds nothing: give some, for instance qpde.Bits(4, 8)")
    if newton_steps is not None and newton_steps < 0:
        raise ValueError(f"`newton_steps` (={newton_steps}) must be at least 0, or None for the cheapest proof")
    count = None if newton_steps is None else np.int32(newton_steps)  # traced: one program for all numbers
    x = jnp.asarray(read_batch(x, variables))
    if hasattr(model, "links"):
        if deployed is not None:
            raise ValueError("`deployed` is for networks of qpde.models: a chain is deployed as it runs")
        return certify_chain(model, variables, x, bits, newton_steps=count, steps=steps)
    check_model(model)
    bits = model.checked_bits(bits)
    size = (x.shape[1], x.shape[2])
    if steps is None:
        steps = step_bounds(model, variables, size, bits)
    else:
        steps.check(model, variables, size, bits)
    a_priori = worst_case(model, steps, size)
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors of products to fewer bits
        if deployed is None:
            run = _run(model, variables, x, bits)
        else:
            run, a_priori = _checked_run(model, variables, x, bits, deployed), np.inf
    with in_float64():
        lipschitz = np.array([step.lipschitz for step in steps.bounds])
        if isinstance(model, SegmentationNetwork):
            given = (model, variables, steps.parts, x, run, bits, lipschitz, steps.local, a_priori, count)
            return jax.device_get(_pixel_certificate(*given))
        found = _certificate(model, variables, steps.parts, x, run, bits, lipschitz, a_priori, steps.tail, count)
        return jax.device_get(found)


def exact_twin(
    model: Any, variables: Mapping[str, Any], x: Batch, bits: Bits
) -> Float[np.ndarray, "n *pixels classes"]:
    """Logits of the twin that a certificate speaks of, computed in float64.

    Args:
      model: Network, as for `certify`.
      variables: Its collections.
      x: Images (N, H, W, C).
      bits: Bits, as for `certify`.
    Raises:
      ValueError: a network with clips for each width, or one that computes in bfloat16.
    """
    x = read_batch(x, variables)
    if hasattr(model, "links"):
        return exact_chain(model, variables, jnp.asarray(x), bits)
    check_model(model)
    bits = model.checked_bits(bits)
    rounded = rounded_parts(model, variables, bits)
    with in_float64():
        return np.asarray(_exact_twin(model, variables, rounded, jnp.asarray(x), bits))


@partial(jax.jit, static_argnames="model")
def _run(model, variables, x, bits):
    """Logits and states of the quantized network as it runs, the stems' first."""
    return follow(model, [partial(part, mode=Mode()) for part in model.bound_parts(variables, bits)], x)


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
def _exact_twin(model, variables, rounded, x, bits):
    return follow(model, _twin_parts(model, variables, rounded, bits), to_float64(x))[0]


@partial(jax.jit, static_argnames="model")
def _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, gain, newton_steps):
    logits, states = run
    stem, *twin = _twin_parts(model, variables, rounded, bits)
    twin, tail = twin[: len(model.blocks)], twin[len(model.blocks) :]

    def estimate(state):
        for part in tail:
            state = part(state)
        return state

    states = [stem(to_float64(x)), *to_float64(states[1:])]
    pair = gain * pair_norms(to_float64(variables["params"]["head"]["kernel"]), jnp.argmax(logits, axis=-1))
    return proof(twin, states, logits, estimate, lipschitz, pair, a_priori, newton_steps)


@partial(jax.jit, static_argnames="model")
def _pixel_certificate(model, variables, rounded, x, run, bits, lipschitz, local, a_priori, newton_steps):
    parts = _twin_parts(model, variables, rounded, bits)
    kernel = to_float64(variables["params"]["head"]["kernel"])
    return pixel_proof(model, parts, to_float64(x), run, kernel, lipschitz, local, a_priori, newton_steps)


def _twin_parts(model, variables, rounded, bits):
    """The twin's parts as functions of a state, in float64."""
    mode = Mode(compute_dtype="float64")
    parts = model.bound_parts(variables, Bits(None, bits.twin.activations))
    return [
        partial(part._replace(variables=to_float64(own), gamma2=to_float64(gamma2)), mode=mode)
        for part, (own, gamma2) in zip(parts, rounded, strict=True)
    ]
