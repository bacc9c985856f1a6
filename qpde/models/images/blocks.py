"""Residual blocks as pure functions: one step of a differential equation each.

    basic, stable    z = Q2(S(s(N1(K xq)))),  y = N2(K^T z) or N2(K2 z),   out = s(shortcut - h y)
    inverted         the same around a 1x1 expansion and a depthwise convolution, without the last s

with xq = Q1(x), quantizers Q, smoothing S, ReLU s and norms N (Ben-Yair et al., 2022). The norms of the symmetric step,
and what all blocks share, are in `qpde.models.images.block`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpde import operators
from qpde.kernel_norms import conv_norm_bound, depthwise_norm_bound
from qpde.models.images.block import Block, Scaling
from qpde.models.images.parts import StepBound, rounding_radius
from qpde.models.layers import average_pool

__all__ = ["BasicBlock", "InvertedBlock", "StableBlock"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasicBlock(Block):
    """ResNet's block: two 3x3 convolutions, or one and its adjoint, beside a shortcut (design of He et al., 2016)."""

    @property
    def has_projection(self) -> bool:
        """Whether the shortcut is a 1x1 convolution: when stride or width changes."""
        return self.stride != 1 or self.width_in != self.width_out

    def kernel_shapes(self):
        if self.symmetric:
            shapes = {"kernel1": (3, 3, self.width_in, self.hidden)}
        else:
            last = (3, 3, self.width_out, self.width_out)
            shapes = {"kernel1": (3, 3, self.width_in, self.width_out), "kernel2": last}
        if self.has_projection:
            shapes["shortcut_kernel"] = (1, 1, self.width_in, self.width_out)
        return shapes

    def norm_widths(self):
        widths = {"norm1": self.hidden if self.symmetric else self.width_out}
        if not self.symmetric or self.norm == "separate":
            widths["norm2"] = self.width_out
        if self.has_projection:
            widths["shortcut_norm"] = self.width_out
        return widths

    @property
    def scalings(self):
        if self.symmetric:
            return self._symmetric_scalings("kernel1")
        outputs: tuple[Scaling, ...] = (Scaling("norm1", "kernel1"), Scaling("norm2", "kernel2"))
        if self.has_projection:
            outputs += (Scaling("shortcut_norm", "shortcut_kernel"),)
        return self._activation_scalings(Scaling("norm1", "kernel2", 1)) + outputs

    def macs(self, height, width):
        pixels = math.prod(self.output_size(height, width))
        counts = {name: pixels * math.prod(shape) for name, shape in self.kernel_shapes().items()}
        if self.symmetric:
            counts["kernel1"] *= 2
        return counts

    def composed_kernel(self, kernels):
        return kernels["kernel1"], 1

    def _plain_bound(self, factors, first, radii, size):
        norms = [conv_norm_bound(factors.kernels[f"kernel{i}"] * factors.scales[f"norm{i}"]) for i in (1, 2)]
        shortcut = 1.0
        if self.has_projection:
            shortcut = conv_norm_bound(factors.kernels["shortcut_kernel"] * factors.scales["shortcut_norm"])
        second = radii[0] * math.sqrt(math.prod(self.output_size(*size)) * factors.kernels["kernel1"].shape[-1])
        injected = norms[1] * (norms[0] * first + second)
        if self.residual == "rounded":
            injected += shortcut * first
        return StepBound(shortcut + norms[0] * norms[1], injected)

    def spread(self, norms, e):
        if self.symmetric:
            return self._symmetric_spread(norms, e)
        hidden = operators.conv(e, norms["kernel1"], stride=self.stride, dilation=self.dilation)
        shortcut = operators.conv(e, norms["shortcut_kernel"], stride=self.stride) if self.has_projection else e
        return shortcut + operators.conv(hidden, norms["kernel2"], dilation=self.dilation_after)

    def linear_pair(self, kernels):
        kernel, d = kernels["kernel1"], self.dilation

        def linear(x):
            return operators.conv(x, kernel, dilation=d)

        def adjoint(y):
            return operators.conv_adjoint(y, kernel, dilation=d)

        return linear, adjoint

    def residual_branch(self, xq, kernels, variables, step_size, call):
        """h y: the symmetric branch, or two convolutions with their norms and h = 1."""
        if self.symmetric:
            return self.symmetric_branch(xq, kernels, variables, step_size, call)
        hidden = call.conv(xq, 0, kernels, "kernel1", stride=self.stride, dilation=self.dilation)
        z = call.activation(call.smooth(jax.nn.relu(call.batch_norm("norm1", hidden))), 1)
        return call.batch_norm("norm2", call.conv(z, 1, kernels, "kernel2", dilation=self.dilation_after))

    def step(self, x, variables, step_size, call):
        kernels = call.kernels()
        xq = call.activation(x, 0)
        shortcut = call.shortcut(x, xq)
        y = self.residual_branch(xq, kernels, variables, step_size, call)
        if self.has_projection:
            index = 0 if shortcut is xq else None
            projected = call.conv(shortcut, index, kernels, "shortcut_kernel", stride=self.stride)
            shortcut = call.batch_norm("shortcut_norm", projected)
        return call.smooth_output(jax.nn.relu(shortcut - y))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableBlock(BasicBlock):
    """A basic block that keeps its width, then grows by copying channels of xq and halves by average pooling.

    Where dilation replaces the stride, nothing is pooled.
    """

    has_projection = False
    keeps_width = True

    def output_size(self, height, width):
        return height // self.stride, width // self.stride

    def kernel_shapes(self):
        if self.symmetric:
            return {"kernel1": (3, 3, self.width_in, self.hidden)}
        return dict.fromkeys(("kernel1", "kernel2"), (3, 3, self.width_in, self.width_in))

    def norm_widths(self):
        widths = {"norm1": self.hidden if self.symmetric else self.width_in}
        if not self.symmetric or self.norm == "separate":
            widths["norm2"] = self.width_in
        return widths

    def macs(self, height, width):
        return {
            name: height * width * math.prod(shape) * (2 if self.symmetric else 1)
            for name, shape in self.kernel_shapes().items()
        }

    def step_bound(self, factors, bits, size):
        """Bounds of the step at full size, then sqrt(L^2 + 1) for copied channels and 1/2 for a mean of 2x2 pixels."""
        at_full_size = dataclasses.replace(self, stride=1)
        lipschitz, injected = Block.step_bound(at_full_size, factors, bits, size)
        if self.width_out > self.width_in:
            radius = rounding_radius(
                factors.act_clips[0], bits.activations, levels=self.levels, signed=self.signed_inputs
            )
            first = radius * math.sqrt(math.prod(size) * self.width_in)
            lipschitz = math.hypot(lipschitz, 1.0)
            injected = math.hypot(injected, first if self.residual == "rounded" else 0.0)
        halving = 2 if self.stride == 2 else 1
        return StepBound(lipschitz / halving, injected / halving)

    def spread(self, norms, e):
        at_full_size = dataclasses.replace(self, stride=1, dilation_after=self.dilation)
        out = BasicBlock.spread(at_full_size, norms, e)
        if self.width_out > self.width_in:
            out = jnp.hypot(out, e)
        return average_pool(out) if self.stride == 2 else out

    def residual_branch(self, xq, kernels, variables, step_size, call):
        # The stride lies in the pooling, so the convolutions run at full size, all on the grid of the input.
        at_full_size = dataclasses.replace(self, stride=1, dilation_after=self.dilation)
        return BasicBlock.residual_branch(at_full_size, xq, kernels, variables, step_size, call)

    def step(self, x, variables, step_size, call):
        xq = call.activation(x, 0)
        shortcut = call.shortcut(x, xq)
        out = jax.nn.relu(shortcut - self.residual_branch(xq, call.kernels(), variables, step_size, call))
        if self.width_out > self.width_in:
            out = jnp.concatenate([out, shortcut[..., : self.width_out - self.width_in]], axis=-1)
        return call.smooth_output(average_pool(out) if self.stride == 2 else out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertedBlock(Block):
    """MobileNetV2's inverted residual: expand 1x1, depthwise 3x3, project 1x1 or the adjoint of the first two.

    Attributes:
      padded: Whether the symmetric step's depthwise convolution keeps the size of the map. As published it has no
        padding, and needs a map that is larger than its reach.
    """

    padded: bool = False

    has_signed_inputs = True
    depthwise = ("kernel2",)

    @property
    def act_count(self):
        return 2 if self.symmetric else 3

    @property
    def smallest_map(self):
        return 1 + self._shrinks

    @property
    def _shrinks(self) -> int:
        """By how much a side of the hidden map is smaller than that of the input, strides apart."""
        return 2 * self.dilation if self.symmetric and not self.padded else 0

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
        if self.symmetric:  # as many inputs of K^T as outputs of K
            inner = (height - self._shrinks) * (width - self._shrinks)
            return {
                "kernel1": 2 * height * width * math.prod(shapes["kernel1"]),
                "kernel2": 2 * inner * math.prod(shapes["kernel2"]),
            }
        after = math.prod(self.output_size(height, width))
        pixels = {"kernel1": height * width, "kernel2": after, "kernel3": after}
        return {name: pixels[name] * math.prod(shape) for name, shape in shapes.items()}

    def composed_kernel(self, kernels):
        return np.einsum("abc,ic->abic", kernels["kernel2"][:, :, 0], kernels["kernel1"][0, 0]), int(self.padded)

    def _plain_bound(self, factors, first, radii, size):
        bounds = (conv_norm_bound, depthwise_norm_bound, conv_norm_bound)
        norms = [
            bound(factors.kernels[f"kernel{i}"] * factors.scales[f"norm{i}"]) for i, bound in enumerate(bounds, start=1)
        ]
        hidden = (math.prod(size) * self.hidden, math.prod(self.output_size(*size)) * self.hidden)
        shortcut = 1.0 if self.keeps_shape else 0.0
        error = first
        for norm, radius, numbers in zip(norms, radii, hidden, strict=False):
            error = norm * error + radius * math.sqrt(numbers)
        injected = norms[2] * error
        if self.residual == "rounded":
            injected += shortcut * first
        return StepBound(shortcut + math.prod(norms), injected)

    def tap_kernels(self, taps):
        return {"kernel1": jnp.ones((1, 1, 1, 1), taps.dtype), "kernel2": taps}

    def spread(self, norms, e):
        if self.symmetric:
            return self._symmetric_spread(norms, e)
        hidden = operators.conv(e, norms["kernel1"])
        hidden = operators.conv(hidden, norms["kernel2"], stride=self.stride, dilation=self.dilation)
        branch = operators.conv(hidden, norms["kernel3"])
        return e + branch if self.keeps_shape else branch

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have one shape, so that a plain block has a shortcut."""
        return self.stride == 1 and self.width_in == self.width_out

    def linear_pair(self, kernels):
        expand, depthwise = kernels["kernel1"], kernels["kernel2"]
        options: dict[str, Any] = {"padding": None if self.padded else 0, "dilation": self.dilation}

        def linear(x):
            return operators.depthwise(operators.conv(x, expand), depthwise, **options)

        def adjoint(z):
            return operators.conv_adjoint(operators.depthwise_adjoint(z, depthwise, **options), expand)

        return linear, adjoint

    def step(self, x, variables, step_size, call):
        kernels = call.kernels()
        xq = call.activation(x, 0, signed=self.signed_inputs)
        shortcut = call.shortcut(x, xq, signed=self.signed_inputs)
        if self.symmetric:
            return call.smooth_output(shortcut - self.symmetric_branch(xq, kernels, variables, step_size, call))
        z = call.batch_norm("norm1", call.conv(xq, 0, kernels, "kernel1"))
        z = call.activation(call.smooth(jax.nn.relu(z)), 1)
        options = {"stride": self.stride, "dilation": self.dilation}
        z = call.batch_norm("norm2", call.conv(z, 1, kernels, "kernel2", operators.depthwise, **options))
        z = call.activation(call.smooth(jax.nn.relu(z)), 2)
        y = call.batch_norm("norm3", call.conv(z, 2, kernels, "kernel3"))
        return call.smooth_output(shortcut - y if self.keeps_shape else y)
