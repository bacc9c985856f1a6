"""Residual blocks as pure functions: one step of a differential equation each.

A block is a frozen description of one step. `init` makes its parameters and batch statistics, and calling it
with them and a feature map x (N, H, W, C) takes the step:

    basic, stable    z = Q2(S(s(N1(K xq)))),  y = N2(K^T z) or N2(K2 z),   out = s(shortcut - h y)
    inverted         the same around a 1x1 expansion and a depthwise convolution, without the last s

with xq = Q1(x), quantizers Q, smoothing S, ReLU s and norms N (Ben-Yair et al., 2022). The symmetric step's norm is

    separate   N1 and N2 apart, as published: neither symmetric nor non-expansive as a whole
    tied       y = K^T D s(D K xq + b), D = g / std: a gradient step on a convex energy
    spectral   the same with D = g sqrt(c) / |g K| and h = 1: the step is non-expansive whatever is learned

c, the `lipschitz_target`, is what h |D K|^2 is held at where steps find their own size: non-expansive up to 2.

Blocks know nothing of Flax; `qpde.models.network` owns their variables and chains them.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from qpde import norms, operators, quantizers, stencils
from qpde.bits import Bits
from qpde.models.layers import NORM_EPSILON, Mode, Quantizer, average_pool, he_normals, moments, normalize, row

__all__ = ["NORMS", "RESIDUALS", "BasicBlock", "Block", "InvertedBlock", "Scaling", "Smoothing", "StableBlock"]

NORMS = ("separate", "tied", "spectral")
RESIDUALS = ("rounded", "precise")
LIPSCHITZ_TARGET = (
    1.9  # where nothing else is asked for: as far as a power iteration's |D K|, which is a bit low, allows
)


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """Total-variation smoothing after the nonlinearities of a block, before their quantizers.

    Attributes:
      kind: of the diffusivity, see `qpde.stencils.tv_step`.
      steps: number of explicit steps.   gamma2: their size.   eps: of the energy sqrt(|grad x|^2 + eps^2).
      blocks: indices of the blocks that smooth, counted through the network; None is all of them.
      output: smooth the block's output too (the next block's quantizer input), not only the hidden map.
      learned: each block that smooths has a parameter "gamma2" of its own, which starts at the one given.
    """

    kind: str = "isotropic"
    steps: int = 1
    gamma2: float = 0.025
    eps: float = 0.1
    blocks: tuple[int, ...] | None = None
    output: bool = False
    learned: bool = False


class Scaling(NamedTuple):
    """A scale, one number a channel, that a block's function does not depend on; see `qpde.equalization`.

    Attributes:
      norm, kernel: the two that share it.
      act_index: of the activation between norm and kernel, whose scale it is; None for that of the kernel's output,
        which the norm behind it takes up.
    """

    norm: str
    kernel: str
    act_index: int | None = None


@dataclasses.dataclass(frozen=True)
class Block(abc.ABC):
    """What all blocks share: their description, their quantizers and the symmetric branch.

    Attributes:
      width_in, width_out: channels.   stride: of the block.   symmetric: K^T instead of a second kernel.
      expansion: of the inverted block's hidden width.
      norm, residual, levels, standardize, per_channel, clip_bits, signed_inputs, step_size, lipschitz_target: see
        `qpde.models.image_network`.
    """

    width_in: int
    width_out: int
    stride: int
    symmetric: bool
    expansion: int = 1
    norm: str = "separate"
    residual: str = "rounded"
    levels: str = "uniform"
    standardize: bool = True
    per_channel: bool = False
    clip_bits: tuple[int, ...] | None = None
    signed_inputs: bool = False
    step_size: float | str = 0.1
    lipschitz_target: float = LIPSCHITZ_TARGET
    smoothing: Smoothing | None = None

    act_count = 2
    has_signed_inputs = False  # whether a block's input can be negative
    smallest_map = 1  # side of an input that it can take

    @property
    def has_spectral_state(self) -> bool:
        """Whether the step's size follows from a spectral norm, whose singular vector is carried along."""
        return self.symmetric and (self.norm == "spectral" or self.step_size == "auto")

    @property
    def learns_gamma2(self) -> bool:
        """Whether the size of the smoothing steps is a parameter."""
        return self.smoothing is not None and self.smoothing.learned

    @abc.abstractmethod
    def kernel_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """HWIO shape of every kernel by name, in the order of `weight_clips`, one number (or one a channel) each."""

    @abc.abstractmethod
    def norm_widths(self) -> dict[str, int]:
        """Channels of every batch norm by name."""

    @property
    @abc.abstractmethod
    def scalings(self) -> tuple[Scaling, ...]:
        """The scales of channels that are free, of activations first."""

    def _symmetric_scalings(self, kernel: str) -> tuple[Scaling, ...]:
        """K^T N1(K x) leaves the scale of z = s(N1(K x)) free. K^T D s(D K x) does not, but D takes up that of K."""
        if self.norm == "separate":
            return self._activation_scalings(Scaling("norm1", kernel, 1))
        return (Scaling("norm1", kernel),)

    def _activation_scalings(self, *scalings: Scaling) -> tuple[Scaling, ...]:
        """s(c x) = c s(x) for a ReLU and c > 0, but S(c x) is not c S(x): smoothing fixes the scale."""
        return scalings if self.smoothing is None else ()

    @abc.abstractmethod
    def macs(self, height: int, width: int) -> dict[str, int]:
        """Multiply-accumulates of one image by kernel name, both uses of a symmetric kernel counted."""

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') that the block makes of (H, W)."""
        return -(-height // self.stride), -(-width // self.stride)

    def init(self, key: PRNGKeyArray) -> tuple[dict, dict]:
        """Parameters (He normal kernels, unit norms, the published clips) and batch statistics of one block."""
        shapes = self.kernel_shapes()
        params: dict[str, Any] = dict(zip(shapes, he_normals(key, list(shapes.values())), strict=True))
        stats: dict[str, Any] = {}
        for name, channels in self.norm_widths().items():
            params[name] = {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}
            stats[name] = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
        if self.symmetric and self.norm == "spectral":
            del stats["norm1"]["var"]
        params["weight_clips"] = self._initial_weight_clips(params)
        params["act_clips"] = jnp.full(self.act_count, quantizers.ACTIVATION_CLIP)
        if self.clip_bits is not None:
            for name in ("weight_clips", "act_clips"):
                params[name] = jnp.tile(params[name], (len(self.clip_bits), 1))
        if self.learns_gamma2:
            params["gamma2"] = jnp.float32(self.smoothing.gamma2)
        return params, stats

    def _initial_weight_clips(self, kernels: dict) -> jax.Array:
        """The published constant for standardized weights, the largest magnitude for others."""
        method = "constant" if self.standardize else "absmax"
        options = {"signed": True, "method": method, "per_channel": self.per_channel}
        clips = [quantizers.initial_clip(kernels[name], None, **options) for name in self.kernel_shapes()]
        return jnp.concatenate([clip.reshape(-1) for clip in clips])

    def clips_at(self, params: dict, bits: Bits) -> dict[str, Float[Array, " n"]]:
        """`weight_clips` and `act_clips` of these widths, traced or not.

        Where widths have clips of their own, (widths, n), it is the row of the first of `clip_bits` that is not
        smaller, and the last one where all are.
        """
        rows = {"weight_clips": params["weight_clips"], "act_clips": params["act_clips"]}
        if self.clip_bits is None:
            return rows

        def place(width):
            last = len(self.clip_bits) - 1
            return last if width is None else jnp.minimum(jnp.searchsorted(jnp.array(self.clip_bits), width), last)

        return {name: own[place(width)] for (name, own), width in zip(rows.items(), bits, strict=True)}

    def split_weight_clips(self, clips: Float[Array, " n"]) -> list[Array]:
        """The clip of every kernel, () or (C_out,), from `weight_clips`."""
        if not self.per_channel:
            return list(clips)
        ends = itertools.accumulate(shape[-1] for shape in self.kernel_shapes().values())
        return jnp.split(clips, list(ends)[:-1])

    def initial_spectral(self, key: PRNGKeyArray, params: dict, height: int, width: int) -> Float[Array, "1 h w c"]:
        """Start (1, H, W, C) of the power iteration that is carried from step to step."""
        linear, adjoint = self.linear_pair(params)
        v = jax.random.normal(key, (1, height, width, self.width_in))
        return norms.power_iterations(linear, adjoint, v / jnp.linalg.norm(v), 20)[1]

    @abc.abstractmethod
    def linear_pair(self, kernels: dict) -> tuple[Callable, Callable]:
        """The symmetric step's K and K^T, from its kernels."""

    def symmetric_branch(self, xq: jax.Array, kernels: dict, variables: dict, step_size: Any, call: _Call) -> jax.Array:
        """h K^T(z) with the chosen norm: what the symmetric step subtracts."""
        linear, adjoint = self.linear_pair(kernels)
        params = variables["params"]
        hidden = linear(xq)
        if self.norm == "separate":
            z = call.activation(call.smooth(jax.nn.relu(call.batch_norm("norm1", hidden))), 1)
            return step_size * call.batch_norm("norm2", adjoint(z))

        mean, var = call.statistics("norm1", hidden)
        scale, step_size = self._tied_scale(linear, adjoint, var, step_size, call)
        shift = params["norm1"]["bias"] - mean * scale
        z = call.activation(call.smooth(jax.nn.relu(hidden * row(scale) + row(shift))), 1)
        return step_size * adjoint(row(scale) * z)

    def _tied_scale(self, linear, adjoint, var, step_size, call):
        """D and h of the tied and the spectral norm."""
        gain = call.params["norm1"]["scale"]
        if self.norm == "spectral":
            return gain * (math.sqrt(self.lipschitz_target) / call.spectral_norm(linear, adjoint, gain)), 1.0
        scale = gain * jax.lax.rsqrt(var + NORM_EPSILON)
        if self.has_spectral_state:
            step_size = self.lipschitz_target / call.spectral_norm(linear, adjoint, scale) ** 2
        return scale, step_size

    def factors(self, variables: dict, step_size: Any, bits: Bits) -> tuple[dict, dict, Any]:
        """What the step multiplies by in evaluation: its rounded kernels, the scale D of every norm, and h.

        Args:
          variables, step_size, bits: as for a call.
        Returns:
          Kernels by name (HWIO), scales (C,) by norm, step size.
        """
        call = _Call(self, variables, bits, Mode(), None)
        kernels, stats = call.kernels(), variables["batch_stats"]
        scales = {
            n: call.params[n]["scale"] * jax.lax.rsqrt(s["var"] + NORM_EPSILON) for n, s in stats.items() if "var" in s
        }
        if self.symmetric and self.norm != "separate":
            var = stats["norm1"].get("var")
            scales["norm1"], step_size = self._tied_scale(*self.linear_pair(kernels), var, step_size, call)
        return kernels, scales, step_size

    def __call__(
        self,
        variables: dict,
        x: Float[Array, "n h w c"],
        step_size: Any,
        bits: Bits,
        mode: Mode,
        gamma2: Any = None,
    ) -> tuple[Float[Array, "n h_out w_out c_out"], dict]:
        """One step.

        Args:
          variables: {"params", "batch_stats"[, "spectral"]} of this block.
          x: (N, H, W, width_in) float32.   step_size: scalar h, unused where the block finds its own.
          bits: scalars or None.   mode: of the call.   gamma2: of the smoothing, None for no smoothing.
        Returns:
          (N, H', W', width_out), and the changed collections: {"batch_stats", "spectral", "observed"}.
        """
        call = _Call(self, variables, bits, mode, gamma2)
        out = self.step(x, variables, step_size, call)
        return out, call.updates

    @abc.abstractmethod
    def step(self, x: jax.Array, variables: dict, step_size: Any, call: _Call) -> jax.Array:
        """The step's formula."""


@dataclasses.dataclass(frozen=True)
class BasicBlock(Block):
    """ResNet's block: two 3x3 convolutions, or one and its adjoint, beside a shortcut (design of He et al., 2016)."""

    @property
    def has_projection(self) -> bool:
        """Whether the shortcut is a 1x1 convolution: when stride or width changes."""
        return self.stride != 1 or self.width_in != self.width_out

    def kernel_shapes(self):
        shapes = {"kernel1": (3, 3, self.width_in, self.width_out)}
        if not self.symmetric:
            shapes["kernel2"] = (3, 3, self.width_out, self.width_out)
        if self.has_projection:
            shapes["shortcut_kernel"] = (1, 1, self.width_in, self.width_out)
        return shapes

    def norm_widths(self):
        widths = {"norm1": self.width_out}
        if not self.symmetric or self.norm == "separate":
            widths["norm2"] = self.width_out
        if self.has_projection:
            widths["shortcut_norm"] = self.width_out
        return widths

    @property
    def scalings(self):
        if self.symmetric:
            return self._symmetric_scalings("kernel1")
        outputs = (Scaling("norm1", "kernel1"), Scaling("norm2", "kernel2"))
        if self.has_projection:
            outputs += (Scaling("shortcut_norm", "shortcut_kernel"),)
        return self._activation_scalings(Scaling("norm1", "kernel2", 1)) + outputs

    def macs(self, height, width):
        pixels = math.prod(self.output_size(height, width))
        counts = {name: pixels * math.prod(shape) for name, shape in self.kernel_shapes().items()}
        if self.symmetric:
            counts["kernel1"] *= 2
        return counts

    def linear_pair(self, kernels):
        kernel = kernels["kernel1"]
        return (lambda x: operators.conv(x, kernel)), (lambda y: operators.conv_adjoint(y, kernel))

    def residual_branch(self, xq, kernels, variables, step_size, call):
        """h y: the symmetric branch, or two convolutions with their norms and h = 1."""
        if self.symmetric:
            return self.symmetric_branch(xq, kernels, variables, step_size, call)
        hidden = call.batch_norm("norm1", operators.conv(xq, kernels["kernel1"], stride=self.stride))
        z = call.activation(call.smooth(jax.nn.relu(hidden)), 1)
        return call.batch_norm("norm2", operators.conv(z, kernels["kernel2"]))

    def step(self, x, variables, step_size, call):
        kernels = call.kernels()
        xq = call.activation(x, 0)
        shortcut = call.shortcut(x, xq)
        y = self.residual_branch(xq, kernels, variables, step_size, call)
        if self.has_projection:
            projected = operators.conv(shortcut, kernels["shortcut_kernel"], stride=self.stride)
            shortcut = call.batch_norm("shortcut_norm", projected)
        return call.smooth_output(jax.nn.relu(shortcut - y))


@dataclasses.dataclass(frozen=True)
class StableBlock(BasicBlock):
    """A basic block that keeps its width, then grows by copying channels of xq and halves by average pooling."""

    has_projection = False

    def output_size(self, height, width):
        return height // self.stride, width // self.stride

    def kernel_shapes(self):
        shapes = {"kernel1": (3, 3, self.width_in, self.width_in)}
        if not self.symmetric:
            shapes["kernel2"] = (3, 3, self.width_in, self.width_in)
        return shapes

    def norm_widths(self):
        two = not self.symmetric or self.norm == "separate"
        return {"norm1": self.width_in} | ({"norm2": self.width_in} if two else {})

    def macs(self, height, width):
        return {
            name: height * width * math.prod(shape) * (2 if self.symmetric else 1)
            for name, shape in self.kernel_shapes().items()
        }

    def residual_branch(self, xq, kernels, variables, step_size, call):
        # The stride lies in the pooling, so the convolutions run at full size.
        at_full_size = dataclasses.replace(self, stride=1)
        return BasicBlock.residual_branch(at_full_size, xq, kernels, variables, step_size, call)

    def step(self, x, variables, step_size, call):
        xq = call.activation(x, 0)
        shortcut = call.shortcut(x, xq)
        out = jax.nn.relu(shortcut - self.residual_branch(xq, call.kernels(), variables, step_size, call))
        if self.width_out > self.width_in:
            out = jnp.concatenate([out, shortcut[..., : self.width_out - self.width_in]], axis=-1)
        return call.smooth_output(average_pool(out) if self.stride == 2 else out)


@dataclasses.dataclass(frozen=True)
class InvertedBlock(Block):
    """MobileNetV2's inverted residual: expand 1x1, depthwise 3x3, project 1x1 or the adjoint of the first two."""

    has_signed_inputs = True

    @property
    def act_count(self):
        return 2 if self.symmetric else 3

    @property
    def smallest_map(self):
        return 3 if self.symmetric else 1  # its depthwise convolution has no padding

    @property
    def hidden(self) -> int:
        """Expanded width."""
        return self.width_in * self.expansion

    def kernel_shapes(self):
        shapes = {"kernel1": (1, 1, self.width_in, self.hidden), "kernel2": (3, 3, 1, self.hidden)}
        if not self.symmetric:
            shapes["kernel3"] = (1, 1, self.hidden, self.width_out)
        return shapes

    def norm_widths(self):
        if self.symmetric:
            return {"norm1": self.hidden} | ({"norm2": self.width_out} if self.norm == "separate" else {})
        return {"norm1": self.hidden, "norm2": self.hidden, "norm3": self.width_out}

    @property
    def scalings(self):
        if self.symmetric:
            return self._symmetric_scalings("kernel2")
        activations = self._activation_scalings(Scaling("norm1", "kernel2", 1), Scaling("norm2", "kernel3", 2))
        return activations + tuple(Scaling(f"norm{i}", f"kernel{i}") for i in (1, 2, 3))

    def macs(self, height, width):
        shapes = self.kernel_shapes()
        if self.symmetric:  # (H-2)(W-2) outputs of the depthwise convolution, and as many inputs back
            inner = (height - 2) * (width - 2)
            return {
                "kernel1": 2 * height * width * math.prod(shapes["kernel1"]),
                "kernel2": 2 * inner * math.prod(shapes["kernel2"]),
            }
        after = math.prod(self.output_size(height, width))
        pixels = {"kernel1": height * width, "kernel2": after, "kernel3": after}
        return {name: pixels[name] * math.prod(shape) for name, shape in shapes.items()}

    def linear_pair(self, kernels):
        expand, depthwise = kernels["kernel1"], kernels["kernel2"]

        def linear(x):
            return operators.depthwise(operators.conv(x, expand), depthwise, padding=0)

        def adjoint(z):
            return operators.conv_adjoint(operators.depthwise_adjoint(z, depthwise, padding=0), expand)

        return linear, adjoint

    def step(self, x, variables, step_size, call):
        kernels = call.kernels()
        xq = call.activation(x, 0, signed=self.signed_inputs)
        shortcut = call.shortcut(x, xq, signed=self.signed_inputs)
        if self.symmetric:
            return call.smooth_output(shortcut - self.symmetric_branch(xq, kernels, variables, step_size, call))
        z = call.batch_norm("norm1", operators.conv(xq, kernels["kernel1"]))
        z = call.activation(call.smooth(jax.nn.relu(z)), 1)
        z = call.batch_norm("norm2", operators.depthwise(z, kernels["kernel2"], stride=self.stride))
        z = call.activation(call.smooth(jax.nn.relu(z)), 2)
        y = call.batch_norm("norm3", operators.conv(z, kernels["kernel3"]))
        keeps_shape = self.stride == 1 and self.width_in == self.width_out
        return call.smooth_output(shortcut - y if keeps_shape else y)


class _Call:
    """What the formulas of one step call by name, and the record of what they changed."""

    def __init__(self, block: Block, variables: dict, bits: Bits, mode: Mode, gamma2: Any):
        self.block, self.bits, self.mode, self.gamma2 = block, bits, mode, gamma2
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.singular_vector = variables.get("spectral")
        clips = block.clips_at(self.params, bits)
        self.clips = {
            "weight_clips": block.split_weight_clips(clips["weight_clips"]),
            "act_clips": list(clips["act_clips"]),
        }
        self.updates: dict[str, Any] = {"batch_stats": {}}
        if mode.observe is not None:
            self.updates["observed"] = {name: [None] * len(clips) for name, clips in self.clips.items()}

    def kernels(self) -> dict[str, jax.Array]:
        """Q_w of every kernel, in the dtype to compute in."""
        quantized = {}
        for i, name in enumerate(self.block.kernel_shapes()):
            kernel, bits = self.params[name], self.bits.weights
            if bits is not None and is_depthwise(kernel.shape):
                bits = depthwise_bits(bits)
            if bits is not None and self.block.standardize:
                kernel = quantizers.standardize_weight(kernel)
            self._observe("weight_clips", i, kernel, bits, signed=True)
            rounded = quantizers.quantize_weight(kernel, self.clips["weight_clips"][i], bits, levels=self.block.levels)
            quantized[name] = rounded.astype(self.mode.compute_dtype)
        return quantized

    def _observe(self, name, index, x, bits, *, signed):
        if self.mode.observe is not None:
            quantizer = Quantizer(name == "weight_clips", bits, signed, self.block.levels)
            record, self.clips[name][index] = self.mode.observe(x, self.clips[name][index], quantizer)
            self.updates["observed"][name][index] = record

    def activation(self, x: jax.Array, index: int, *, signed: bool = False) -> jax.Array:
        """Q_a with the clip of that index."""
        bits = self.bits.activations
        self._observe("act_clips", index, x, bits, signed=signed)
        clip = self.clips["act_clips"][index]
        return quantizers.quantize_activation(x, clip, bits, levels=self.block.levels, signed=signed)

    def shortcut(self, x: jax.Array, xq: jax.Array, *, signed: bool = False) -> jax.Array:
        """Input of the shortcut: xq (rounded), or x clipped alone (precise), so rounding enters by the branch only."""
        if self.block.residual == "rounded" or self.bits.activations is None:
            return xq
        return quantizers.quantize_activation(x, self.clips["act_clips"][0], 32, signed=signed)

    def smooth(self, x: jax.Array) -> jax.Array:
        """S after a nonlinearity inside the block."""
        if self.gamma2 is None:
            return x
        s = self.block.smoothing
        return stencils.smooth(x, steps=s.steps, gamma2=self.gamma2, eps=s.eps, kind=s.kind)

    def smooth_output(self, x: jax.Array) -> jax.Array:
        """S of the block's output, where asked for."""
        return self.smooth(x) if self.block.smoothing is not None and self.block.smoothing.output else x

    def statistics(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Mean and variance (C,) that normalise x: the batch's in training, else the running ones."""
        mean, var, self.updates["batch_stats"][name] = moments(x, self.stats[name], self.mode)
        return mean, var

    def batch_norm(self, name: str, x: jax.Array) -> jax.Array:
        """(x - mean) / sqrt(var + 1e-5) * scale + bias, per channel."""
        return normalize(x, self.params[name], *self.statistics(name, x))

    def spectral_norm(self, linear: Callable, adjoint: Callable, scale: jax.Array) -> jax.Array:
        """|D K| from the carried singular vector, differentiable in D and K; a floor keeps steps of D K = 0 finite."""
        d = row(scale)
        sigma, vector = norms.power_iterations(
            lambda v: d * linear(v), lambda u: adjoint(d * u), self.singular_vector, self.mode.power_iterations
        )
        self.updates["spectral"] = vector
        return jnp.maximum(sigma, 1e-3)


def is_depthwise(shape: tuple[int, ...]) -> bool:
    """Whether a kernel inside a block, HWIO, is depthwise: one input per output."""
    return shape[2] == 1


def depthwise_bits(bits: Any) -> Any:
    """Width of a depthwise kernel where the others have `bits`: 8, as published, unless those are not rounded."""
    if isinstance(bits, int):
        return bits if bits >= 16 else 8
    return jnp.where(bits >= 16, bits, 8)
