"""What every block is: a frozen description of one step of a differential equation, and the symmetric step's formula.

`init` makes a block's parameters and batch statistics, and calling it with them and a feature map x (N, H, W, C) takes
the step. Its formula is that of its kind, in `qpde.models.images.blocks`. The symmetric branch is the same in all of
them: h y, with z = Q2(S(s(N1(K xq)))), quantizers Q, smoothing S, ReLU s and norms N. The norm is

    separate   y = N2(K^T z), N1 and N2 apart, as published: neither symmetric nor non-expansive as a whole
    tied       y = K^T D s(D K xq + b), D = g / std: a gradient step on a convex energy
    spectral   the same with D = g sqrt(c) / |g K| and h = 1: the step is non-expansive whatever is learned

c, the `lipschitz_target`, is what h |D K|^2 is held at where steps find their own size: non-expansive up to 2.

Blocks know nothing of Flax; `qpde.models.images.stages` owns their variables and chains them.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from qpde import native, norms, quantizers
from qpde.bits import Bits
from qpde.kernel_norms import conv_norm_bound, conv_norm_is_at_most
from qpde.models.images.call import Call
from qpde.models.images.parts import Factors, Part, Read, StepBound, check_convex, norm_scale, rounding_radius
from qpde.models.layers import NORM_EPSILON, Mode, he_normals, row
from qpde.models.options import BlockOptions

__all__ = ["Block", "Scaling"]


class Scaling(NamedTuple):
    """A scale, one number a channel, that a block's function does not depend on; see `qpde.ptq.equalize`.

    Attributes:
      norm, kernel: the two that share it.
      act_index: of the activation between norm and kernel, whose scale it is; None for that of the kernel's output,
        which the norm behind it takes up.
    """

    norm: str
    kernel: str
    act_index: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Part, BlockOptions):
    """What all blocks share: their description, their quantizers and the symmetric branch.

    Attributes:
      width_in: Channels of the input.
      width_out: Channels of the output.
      stride: Stride of the block.
      symmetric: Whether K^T takes the place of a second kernel.
      expansion: Channels of K x in a symmetric step and of the hidden maps of an inverted block, in channels of the
        input.
      dilation: Distance of the taps of convolutions on the block's input.
      dilation_after: Distance of those behind the place of the stride. It is larger where dilation replaces a stride.
    """

    width_in: int
    width_out: int
    stride: int
    symmetric: bool
    expansion: int | float = 1
    dilation: int = 1
    dilation_after: int = 1

    has_signed_inputs = False  # whether a block's input can be negative
    depthwise: ClassVar[tuple[str, ...]] = ()  # names of its depthwise kernels
    keeps_width = False  # whether the first block of a stage can be symmetric: it keeps its width inside

    @property
    def act_count(self) -> int:
        """Quantizers of activations."""
        return 2

    @property
    def hidden(self) -> int:
        """Channels of K x in a symmetric step, and of an inverted block between its 1x1 convolutions."""
        return round(self.width_in * self.expansion)

    @property
    def has_spectral_state(self) -> bool:
        """Whether the step's size follows from a spectral norm, whose singular vector is carried along."""
        return self.symmetric and (self.norm == "spectral" or self.step_size == "auto")

    @property
    def learns_gamma2(self) -> bool:
        """Whether the size of the smoothing steps is a parameter."""
        return self.smoothing is not None and self.smoothing.learned

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

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def parameters(self) -> int:
        return super().parameters + int(self.learns_gamma2)

    def torch_names(self) -> dict[str, str]:
        kernels = {k: f"{_torch_kernel(k)}_weight" for k in self.kernel_shapes()}
        norms = {n: "downsample_bn" if n == "shortcut_norm" else n.replace("norm", "bn") for n in self.norm_widths()}
        return kernels | norms

    def read_params(self, read: Read, at: str) -> dict:
        clips = {
            "weight_clips": [f"{_torch_kernel(k)}_quantizer.alpha" for k in self.kernel_shapes()],
            "act_clips": [f"act{i + 1}_quantizer.alpha" for i in range(self.act_count)],
        }
        return super().read_params(read, at) | {k: np.stack([read(at + n) for n in v]) for k, v in clips.items()}

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
        if self.smoothing is not None and self.smoothing.learned:
            params["gamma2"] = jnp.float32(self.smoothing.gamma2)
        return params, stats

    def _initial_weight_clips(self, kernels: dict) -> jax.Array:
        """The published constant for standardized weights, the largest magnitude for others."""
        method = "constant" if self.standardize else "absmax"
        options: dict[str, Any] = {"signed": True, "method": method, "per_channel": self.per_channel}
        clips = [quantizers.initial_clip(kernels[name], None, **options) for name in self.kernel_shapes()]
        return jnp.concatenate([clip.reshape(-1) for clip in clips])

    def clips_at(self, params: dict, bits: Bits) -> dict[str, Float[Array, " n"]]:
        """`weight_clips` and `act_clips` of these widths, traced or not.

        Where widths have clips of their own, (widths, n), it is the row of the first of `clip_bits` that is not
        smaller, and the last one where all are.
        """
        rows = {"weight_clips": params["weight_clips"], "act_clips": params["act_clips"]}
        known = self.clip_bits
        if known is None:
            return rows

        def place(width):
            last = len(known) - 1
            return last if width is None else jnp.minimum(jnp.searchsorted(jnp.array(known), width), last)

        return {name: own[place(width)] for (name, own), width in zip(rows.items(), bits, strict=True)}

    def clip_lists(self, params: dict, bits: Bits) -> dict[str, list[Array]]:
        """`weight_clips`, that of every kernel, and `act_clips` of these widths."""
        clips = self.clips_at(params, bits)
        weights = self.split_weight_clips(clips["weight_clips"])
        return {"weight_clips": weights, "act_clips": list(clips["act_clips"])}

    def split_weight_clips(self, clips: Float[Array, " n"]) -> list[Array]:
        """The clip of every kernel, () or (C_out,), from `weight_clips`."""
        if not self.per_channel:
            return list(clips)
        ends = itertools.accumulate(shape[-1] for shape in self.kernel_shapes().values())
        return jnp.split(clips, list(ends)[:-1])

    def initial_spectral(self, key: PRNGKeyArray, params: dict, height: int, width: int) -> dict[str, Array]:
        """Start {"vector": (1, H, W, C)} of the power iteration that is carried from step to step."""
        linear, adjoint = self.linear_pair(params)
        v = jax.random.normal(key, (1, height, width, self.width_in))
        return {"vector": norms.power_iterations(linear, adjoint, v / jnp.linalg.norm(v), 20)[1]}

    @abc.abstractmethod
    def linear_pair(self, kernels: dict) -> tuple[Callable, Callable]:
        """The symmetric step's K and K^T, from its kernels."""

    def symmetric_branch(self, xq: jax.Array, kernels: dict, variables: dict, step_size: Any, call: Call) -> jax.Array:
        """h K^T(z) with the chosen norm: what the symmetric step subtracts."""
        kernels = {name: kernels[name] for name in ("kernel1", "kernel2") if name in kernels}
        linear, adjoint = self.linear_pair(kernels)
        params = variables["params"]
        hidden = call.product(lambda k, x: self.linear_pair(k)[0](x), kernels, xq, 0)
        if self.norm == "separate":
            z = call.activation(call.smooth(jax.nn.relu(call.batch_norm("norm1", hidden))), 1)
            back = call.product(lambda k, y: self.linear_pair(k)[1](y), kernels, z, 1, is_adjoint=True)
            return step_size * call.batch_norm("norm2", back)

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
        call = self._call(variables, bits, Mode(), None)
        kernels, stats = call.kernels(), variables["batch_stats"]
        scales = {n: norm_scale(call.params[n], s) for n, s in stats.items() if "var" in s}
        if self.symmetric and self.norm != "separate":
            var = stats["norm1"].get("var")
            scales["norm1"], step_size = self._tied_scale(*self.linear_pair(kernels), var, step_size, call)
        return kernels, scales, step_size

    def step_bound(self, factors: Factors, bits: Bits, size: tuple[int, int]) -> StepBound:
        if self.smoothing is not None:
            check_convex(self.smoothing)
        radii = [
            rounding_radius(clip, bits.activations, levels=self.levels, signed=i == 0 and self.signed_inputs)
            for i, clip in enumerate(factors.act_clips)
        ]
        first = radii[0] * math.sqrt(math.prod(size) * self.width_in)
        if self.symmetric:
            return self._symmetric_bound(factors, first, radii[1], size)
        return self._plain_bound(factors, first, radii[1:], size)

    def local_norms(self, factors: Factors) -> dict[str, np.ndarray]:
        """Norms of the single taps of what the block multiplies by, (kh, kw, 1, 1): what `spread` takes.

        Args:
          factors: What the block multiplies by.
        """
        if self.symmetric:
            kernel, _ = self.composed_kernel(factors.kernels)
            first = kernel * factors.scales["norm1"]
            last = kernel * factors.scales["norm2"][:, None] if self.norm == "separate" else first
            return {"forward": _tap_norms(first), "back": float(factors.step_size) * _tap_norms(last)}
        norms = {"shortcut_kernel": "shortcut_norm"}
        scaled = {
            name: kernel * factors.scales[norms.get(name, name.replace("kernel", "norm"))]
            for name, kernel in factors.kernels.items()
        }
        return {name: _tap_norms(kernel, depthwise=name in self.depthwise) for name, kernel in scaled.items()}

    @abc.abstractmethod
    def spread(self, norms: dict[str, Any], e: Float[Array, "n h w 1"]) -> Float[Array, "n h_out w_out 1"]:
        """Bound the change of every pixel of the twin's output, from that of every pixel of its input, in the 2-norm.

        It is no bound where the block smooths.

        Args:
          norms: Result of `local_norms`.
          e: Bounds, not negative.
        """

    def _symmetric_spread(self, norms: dict[str, Any], e: jax.Array) -> jax.Array:
        linear, _ = self.linear_pair(self.tap_kernels(norms["forward"]))
        _, adjoint = self.linear_pair(self.tap_kernels(norms["back"]))
        return e + adjoint(linear(e))

    def tap_kernels(self, taps: Any) -> dict[str, Any]:
        """Kernels of one channel for `linear_pair`, whose composition has these taps."""
        return {"kernel1": taps}

    def _symmetric_bound(self, factors: Factors, first: float, radius: float, size: tuple[int, int]) -> StepBound:
        """Of xc - h D2 K^T s(D1 K xc): 1 + h |D2 K^T| |D1 K|, or that of a gradient step, max(1, h |D K|^2 - 1).

        `first` and `second` bound |Q_1(x) - clip(x)| and |Q_2(z) - clip(z)|. With L' the constant of the step, rounding
        the shortcut as well gives L' first + h |D2 K^T| second.
        """
        kernel, padding = self.composed_kernel(factors.kernels)
        shrinks = self.dilation * (kernel.shape[0] - 1 - 2 * padding)
        h, hidden_pixels = float(factors.step_size), math.prod(n - shrinks for n in size)
        second = radius * math.sqrt(hidden_pixels * kernel.shape[-1])
        forward = conv_norm_bound(kernel * factors.scales["norm1"])
        if self.norm == "separate":
            back = conv_norm_bound(kernel * factors.scales["norm2"][:, None])
            step = 1 + h * forward * back
        else:
            limit = math.sqrt(2 / h)
            scaled = kernel * factors.scales["norm1"]
            # A dilated convolution is an ordinary one on each of the coarse grids that make up the map.
            height, width = (-(-n // self.dilation) for n in size)
            if forward > limit and conv_norm_is_at_most(scaled, limit, (height, width), padding=padding):
                forward = limit
            back = forward
            # Smoothing between s and K^T, itself non-expansive, leaves no gradient step.
            step = 1 + h * forward**2 if self.smoothing is not None else max(1.0, h * forward**2 - 1)
        branch = h * back * (forward * first + second)
        if self.residual == "precise":
            return StepBound(step, branch)
        return StepBound(step, min(branch + first, step * first + h * back * second))

    @abc.abstractmethod
    def _plain_bound(self, factors: Factors, first: float, radii: list[float], size: tuple[int, int]) -> StepBound:
        """Of the step without a symmetric branch; `radii` are those of the hidden activations."""

    @abc.abstractmethod
    def composed_kernel(self, kernels: dict) -> tuple[Any, int]:
        """K of the symmetric step as one convolution kernel, HWIO, and its padding in taps; NumPy arrays."""

    def __call__(
        self,
        variables: dict,
        x: Float[Array, "n h w c"],
        step_size: Any,
        bits: Bits,
        mode: Mode,
        gamma2: Any = None,
    ) -> tuple[Float[Array, "n h_out w_out c_out"], dict]:
        call = self._call(variables, bits, mode, gamma2)
        return native.materialize(self.step(x, variables, step_size, call)), call.updates

    def _call(self, variables: dict, bits: Bits, mode: Mode, gamma2: Any) -> Call:
        clips = self.clip_lists(variables["params"], bits)
        return Call(self, self.kernel_shapes(), clips, variables, bits, mode, gamma2)

    @abc.abstractmethod
    def step(self, x: jax.Array, variables: dict, step_size: Any, call: Call) -> jax.Array:
        """The step's formula."""


def _tap_norms(kernel: np.ndarray, *, depthwise: bool = False) -> np.ndarray:
    """Norm of the matrix of every tap, (kh, kw, 1, 1); one of a depthwise kernel is diagonal."""
    norms = np.abs(kernel).max((2, 3)) if depthwise else np.linalg.norm(kernel, 2, axis=(2, 3))
    return norms[:, :, None, None]


def _torch_kernel(name: str) -> str:
    return "downsample" if name == "shortcut_kernel" else name.replace("kernel", "conv")
