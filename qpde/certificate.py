"""A certificate: inputs whose prediction the rounding of activations provably does not change.

The twin of a quantized network is the same network, weights rounded, activations clipped but not rounded. With B_j its
steps, x_j = B_j(x_{j-1}) its states and L_j a Lipschitz constant of B_j, any other states c_j that start at c_0 = x_0
keep to them within

    |x_j - c_j| <= E_j = L_j E_{j-1} + d_j,   E_0 = 0,   d_j = |c_j - B_j(c_{j-1})|         the defect of c at step j.

A posteriori, c starts as the quantized network's own states y_j, whose defects are the errors that rounding injects,
and is improved by sweeps of Newton's method on c_j = B_j(c_{j-1}), with J_j the Jacobian of B_j at c_{j-1}:

    c_j <- c_j - v_j,   v_j = J_j v_{j-1} + c_j - B_j(c_{j-1}),   v_0 = 0.

The first sweep carries the errors on as a linear network would, with their signs; what is left of the defects are the
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

A certificate costs more than the twin itself, and as many sweeps as steps end at the twin: what one of few sweeps adds
to the twin's own prediction is why it is the same. Errors were small, they did not grow, and they add up as the
Jacobians carry them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qpde import operators, quantizers, stencils
from qpde.bits import Bits
from qpde.conv_norms import conv_norm_bound, conv_norm_is_at_most, depthwise_norm_bound
from qpde.models.blocks import Block, InvertedBlock, StableBlock, is_depthwise
from qpde.models.layers import NORM_EPSILON, Mode, divide_by_rms, normalize
from qpde.models.network import Network

__all__ = ["Certificate", "StepBound", "certify", "exact_twin", "step_bound", "step_bounds"]


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


class StepBound(NamedTuple):
    """Of one step, for one image size.

    Attributes:
      lipschitz: of the twin's step, in the 2-norm.   injected: a bound of the error of rounding, for every input.
    """

    lipschitz: float
    injected: float


def certify(
    model: Network,
    variables: dict,
    x: Float[Array | np.ndarray, "n h w c"],
    bits: Bits,
    *,
    sweeps: int = 2,
    steps: "list[StepBound] | None" = None,
) -> Certificate:
    """The certificate of a quantized image network on a batch of inputs.

    Args:
      model: of `qpde.models.create`.   variables: its collections.   x: images.
      bits: widths, scalars or one for each block; activations must have one.
      sweeps: of Newton's method, 0 for the injected errors as they are.
      steps: of `step_bounds`, which takes seconds, for who certifies several batches; None finds them.
    Returns:
      `Certificate`.
    Raises:
      ValueError: no width for activations, a negative number of sweeps, not an image network, one with clips for
        each width (`Network.at_width` makes an ordinary one of it), one that computes in bfloat16, or one that smooths
        by a kind that is not convex.
    """
    if not isinstance(model, Network):
        raise ValueError(f"certificates are for image networks; got {type(model).__name__}")
    if bits.activations is None:
        raise ValueError("`bits.activations` (=None) rounds nothing: give a width, for instance qpde.Bits(4, 8)")
    if sweeps < 0:
        raise ValueError(f"`sweeps` (={sweeps}) must be at least 0")
    _check_model(model)
    x = jnp.asarray(x)
    bits = model.checked_bits(bits)
    steps = step_bounds(model, variables, x.shape[1:3], bits) if steps is None else steps
    a_priori = 0.0
    for step in steps:
        a_priori = step.lipschitz * a_priori + step.injected
    with jax.default_matmul_precision("highest"):  # accelerators would round the factors of products to fewer bits
        run, rounded = _run(model, variables, x, bits), _rounded_steps(model, variables, bits)
    with _in_float64():
        lipschitz = np.array([step.lipschitz for step in steps])
        found = _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, np.int32(sweeps))
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
    _check_model(model)
    bits = model.checked_bits(bits)
    rounded = _rounded_steps(model, variables, bits)
    with _in_float64():
        return np.asarray(_exact_twin(model, variables, rounded, jnp.asarray(x), bits))


def step_bounds(model: Network, variables: dict, size: tuple[int, int], bits: Bits) -> list[StepBound]:
    """Constants of every step, for images of that size; on the host, once for a network.

    Args:
      model, variables, bits: as for `certify`.   size: height and width of the images.
    Returns:
      One `StepBound` a block, in order.
    Raises:
      ValueError: as `certify`, for the network.
    """
    _check_model(model)
    found = []
    bits = model.checked_bits(bits)
    for index, (block, own, step_size, _) in enumerate(model.steps(variables)):
        found.append(step_bound(block, own, step_size, _at(bits, index), size))
        size = block.output_size(*size)
    return found


def step_bound(block: Block, variables: dict, step_size: Any, bits: Bits, size: tuple[int, int]) -> StepBound:
    """The table of the module's docstring, and the rounding errors of the quantizers carried through one step.

    `first` and `second` bound |Q_1(x) - clip(x)| and |Q_2(z) - clip(z)|. With L' the constant of xc -> xc - h f(xc),
    rounding the shortcut as well gives L' first + h |B| second for the branch h B s(A x) of the step.

    Args:
      block, variables, step_size: of `Network.steps`.   bits: scalars, activations not None.
      size: height and width of the step's input.
    Raises:
      ValueError: the block smooths by a kind that is not convex.
    """
    if block.smoothing is not None and not stencils.KINDS[block.smoothing.kind].convex:
        convex = ", ".join(name for name, kind in stencils.KINDS.items() if kind.convex)
        raise ValueError(
            f"smoothing of kind {block.smoothing.kind!r} can amplify a difference, so no constant of its step is "
            f"proven: certify networks that smooth by a convex kind ({convex})"
        )
    rounded = _rounded(block, variables, step_size, bits)
    with _in_float64():
        kernels, scales, h = jax.tree.map(np.asarray, _factors(block, rounded, step_size))
    clips = np.asarray(variables["params"]["act_clips"])
    radii = [_rounding(clip, bits.activations, block, i) for i, clip in enumerate(clips)]
    pixels = math.prod(size)
    first = radii[0] * math.sqrt(pixels * block.width_in)
    keeps_rounding = block.residual == "rounded"
    if block.symmetric:
        forward, back, step, hidden = _symmetric_norms(block, kernels, scales, float(h), size)
        second = radii[1] * math.sqrt(hidden)
        branch = h * back * (forward * first + second)
        lipschitz = step
        injected = min(branch + first, step * first + h * back * second) if keeps_rounding else branch
    elif isinstance(block, InvertedBlock):
        norms = [_scaled_norm(block, kernels[f"kernel{i}"], scales[f"norm{i}"]) for i in (1, 2, 3)]
        hidden = (pixels * block.hidden, math.prod(block.output_size(*size)) * block.hidden)
        shortcut = 1.0 if block.stride == 1 and block.width_in == block.width_out else 0.0
        lipschitz = shortcut + math.prod(norms)
        error = first
        for norm, radius, numbers in zip(norms, radii[1:], hidden, strict=False):
            error = norm * error + radius * math.sqrt(numbers)
        injected = norms[2] * error + (shortcut * first if keeps_rounding else 0.0)
    else:
        norms = [_scaled_norm(block, kernels[f"kernel{i}"], scales[f"norm{i}"]) for i in (1, 2)]
        out = size if isinstance(block, StableBlock) else block.output_size(*size)
        shortcut = 1.0
        if block.has_projection:
            shortcut = _scaled_norm(block, kernels["shortcut_kernel"], scales["shortcut_norm"])
        lipschitz = shortcut + norms[0] * norms[1]
        second = radii[1] * math.sqrt(math.prod(out) * kernels["kernel1"].shape[-1])
        injected = norms[1] * (norms[0] * first + second) + (shortcut * first if keeps_rounding else 0.0)
    if isinstance(block, StableBlock):
        if block.width_out > block.width_in:
            lipschitz = math.hypot(lipschitz, 1.0)
            injected = math.hypot(injected, first if keeps_rounding else 0.0)
        if block.stride == 2:
            lipschitz, injected = lipschitz / 2, injected / 2
    return StepBound(lipschitz, injected)


def _check_model(model):
    if model.clip_widths is not None:
        raise ValueError(
            f"the twin of a network with clips for each of {model.clip_widths} clips elsewhere, which no bound covers: "
            "certify `model.at_width(variables, bits)`"
        )
    if model.compute_dtype != "float32":
        raise ValueError(
            f"a network that computes in {model.compute_dtype} rounds more than activations, which no bound covers: "
            "certify `model.clone(compute_dtype='float32')`"
        )


@partial(jax.jit, static_argnames=("block", "step_size"))
def _factors(block, rounded, step_size):
    return block.factors(_float64(rounded), step_size, Bits())


@partial(jax.jit, static_argnames=("block", "step_size"))
def _rounded(block, variables, step_size, bits):
    """The variables of a step with its kernels as they are rounded, in float32 as in a run."""
    kernels, _, _ = block.factors(variables, step_size, bits)
    return {**variables, "params": variables["params"] | kernels}


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Within, arrays can be float64, and accelerators do not round the factors of products."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def _float64(tree):
    return jax.tree.map(lambda v: v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)


def _symmetric_norms(block, kernels, scales, h, size):
    """Bounds of |D1 K| and |D2 K^T|, the constant of xc - h D2 K^T s(D1 K xc), and the hidden numbers of an image."""
    kernel, padding, hidden = kernels["kernel1"], None, math.prod(size) * kernels["kernel1"].shape[-1]
    if isinstance(block, InvertedBlock):
        kernel, padding = np.einsum("abc,ic->abic", kernels["kernel2"][:, :, 0], kernel[0, 0]), 0
        hidden = (size[0] - 2) * (size[1] - 2) * kernel.shape[-1]
    forward = conv_norm_bound(kernel * scales["norm1"])
    if block.norm == "separate":
        back = conv_norm_bound(kernel * scales["norm2"][:, None])
        return forward, back, 1 + h * forward * back, hidden
    limit = math.sqrt(2 / h)
    if forward > limit and conv_norm_is_at_most(kernel * scales["norm1"], limit, size, padding=padding):
        forward = limit
    # Smoothing between s and K^T, itself non-expansive, leaves no gradient step.
    step = 1 + h * forward**2 if block.smoothing is not None else max(1.0, h * forward**2 - 1)
    return forward, forward, step, hidden


def _scaled_norm(block, kernel, scale) -> float:
    depthwise = isinstance(block, InvertedBlock) and is_depthwise(kernel.shape)
    return (depthwise_norm_bound if depthwise else conv_norm_bound)(kernel * scale)


def _rounding(clip, bits, block: Block, index) -> float:
    """The largest |Q(v) - clip(v)|: half a step, or half the widest gap of a level set."""
    if bits >= 16:
        return 0.0
    signed = index == 0 and block.signed_inputs
    if block.levels == "uniform":
        return float(quantizers.quantization_step(float(clip), bits, signed=signed)) / 2
    v = np.linspace(0, 1, 1 << 14, dtype=np.float32)
    rounded = quantizers.quantize_activation(v, 1.0, bits, levels=block.levels, signed=signed)
    return float(clip) * float(np.abs(np.asarray(rounded) - v).max() + v[1])


@partial(jax.jit, static_argnames="model")
def _run(model, variables, x, bits):
    """Logits and states of the quantized network as it runs, the opening's first."""
    states = [_opening(model, variables, x)]
    for index, (block, own, step_size, gamma2) in enumerate(model.steps(variables)):
        states.append(block(own, states[-1], step_size, _at(bits, index), Mode(), gamma2)[0])
    return _logits(model, variables, states[-1]), states


@partial(jax.jit, static_argnames="model")
def _rounded_steps(model, variables, bits):
    """Of every step its variables, the kernels rounded, and gamma2."""
    return [
        (_rounded(block, own, step_size, _at(bits, index)), gamma2)
        for index, (block, own, step_size, gamma2) in enumerate(model.steps(variables))
    ]


@partial(jax.jit, static_argnames="model")
def _exact_twin(model, variables, rounded, x, bits):
    variables = _float64(variables)
    y = _opening(model, variables, _float64(x))
    for step in _twin_steps(model, variables, rounded, bits):
        y = step(y)
    return _logits(model, variables, y)


@partial(jax.jit, static_argnames="model")
def _certificate(model, variables, rounded, x, run, bits, lipschitz, a_priori, sweeps):
    (logits, states), variables = run, _float64(variables)
    z, states = _float64((logits, states))
    start = _opening(model, variables, _float64(x))
    twin = _twin_steps(model, variables, rounded, bits)

    def sweep(_, candidate):
        v, improved = jnp.zeros_like(start), [start]
        for step, entering, leaving in zip(twin, candidate, candidate[1:], strict=False):
            reached, v = _jvp(step, entering, v)
            v = v + (leaving - reached)
            improved.append(leaving - v)
        return improved

    candidate = jax.lax.fori_loop(0, sweeps, sweep, [start, *states[1:]])
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
        widths = Bits(None, _at(bits.twin, index).activations)
        found.append(partial(step, block, step_size, *_float64(rounded[index]), widths))
    return found


def _at(bits, index):
    """The widths of one step."""
    return Bits(*(v if v is None or np.ndim(v) == 0 else v[index] for v in bits))


def _opening(model, variables, x):
    params, norm = variables["params"], variables["batch_stats"]["opening_norm"]
    y = normalize(operators.conv(x, params["opening_kernel"]), params["opening_norm"], norm["mean"], norm["var"])
    return jax.nn.relu(y)


def _logits(model, variables, y):
    """Closing convolution if there is one, pooling, dense head."""
    params, stats = variables["params"], variables["batch_stats"]
    if model.closing_width is not None:
        norm = stats["closing_norm"]
        y = normalize(operators.conv(y, params["closing_kernel"]), params["closing_norm"], norm["mean"], norm["var"])
        y = jax.nn.relu(y)
    pooled = y.mean((1, 2))
    if model.head == "scaled":
        pooled = divide_by_rms(pooled, stats["pooled"]["mean_square"])
    return pooled @ params["head"]["kernel"] + params["head"]["bias"][None]


def _head_norms(model, variables, shape, prediction) -> tuple[Any, Array]:
    """Lipschitz constant from the last state to the pooled features, and |w_i - w_k| for every input's i."""
    params, stats = variables["params"], variables["batch_stats"]
    gain = 1 / math.sqrt(shape[1] * shape[2])
    if model.closing_width is not None:
        norm = params["closing_norm"]["scale"] * jax.lax.rsqrt(stats["closing_norm"]["var"] + NORM_EPSILON)
        gain = gain * jnp.linalg.norm(params["closing_kernel"][0, 0] * norm[None], 2)
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
