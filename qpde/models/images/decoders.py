"""Blocks of decoders as pure functions: convolutions without a shortcut, whose weights and activations are rounded.

With quantizers Q, norms N, smoothing S and ReLU s:

    convolution    S(s(N1(K1 Q1(x))))
    separable      S(s(N2(K2 Q2(S(s(N1(K1 Q1(x))))))))        K1 depthwise, K2 1x1
    pooled         s(N1(K1 Q1(mean of x)))                    one pixel

A decoder's only symmetric steps are those of `qpde.models.images.blocks`.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from qpde import operators
from qpde.kernel_norms import conv_norm_bound, depthwise_norm_bound
from qpde.models.images.block import Block, Scaling
from qpde.models.images.parts import StepBound

__all__ = ["ConvBlock", "PooledBlock", "SeparableBlock"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DecoderBlock(Block):
    """A block that is no step: it has no shortcut and no adjoint."""

    stride: int = 1
    symmetric: bool = False

    def linear_pair(self, kernels):
        raise TypeError(f"{type(self).__name__} is no symmetric step: it has no K^T")

    composed_kernel = linear_pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvBlock(_DecoderBlock):
    """Convolution, norm, ReLU and smoothing.

    Attributes:
      taps: Side of the kernel, odd.
    """

    taps: int = 3

    act_count = 1

    def kernel_shapes(self):
        return {"kernel1": (self.taps, self.taps, self.width_in, self.width_out)}

    def norm_widths(self):
        return {"norm1": self.width_out}

    @property
    def scalings(self):
        return self._activation_scalings(Scaling("norm1", "kernel1"))

    def macs(self, height, width):
        return {"kernel1": height * width * math.prod(self.kernel_shapes()["kernel1"])}

    def _plain_bound(self, factors, first, radii, size):
        norm = conv_norm_bound(factors.kernels["kernel1"] * factors.scales["norm1"])
        return StepBound(norm, norm * first)

    def spread(self, norms, e):
        return operators.conv(e, norms["kernel1"], dilation=self.dilation)

    def step(self, x, variables, step_size, call):
        xq = call.activation(x, 0, signed=self.signed_inputs)
        hidden = call.conv(xq, 0, call.kernels(), "kernel1", dilation=self.dilation)
        return call.smooth(jax.nn.relu(call.batch_norm("norm1", hidden)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparableBlock(_DecoderBlock):
    """A 3x3 depthwise and a 1x1 convolution, each with norm, ReLU and smoothing. The depthwise kernel has 8 bits."""

    depthwise = ("kernel1",)

    def kernel_shapes(self):
        return {"kernel1": (3, 3, 1, self.width_in), "kernel2": (1, 1, self.width_in, self.width_out)}

    def norm_widths(self):
        return {"norm1": self.width_in, "norm2": self.width_out}

    @property
    def scalings(self):
        outputs = (Scaling("norm1", "kernel1"), Scaling("norm2", "kernel2"))
        return self._activation_scalings(Scaling("norm1", "kernel2", 1)) + outputs

    def macs(self, height, width):
        return {name: height * width * math.prod(shape) for name, shape in self.kernel_shapes().items()}

    def _plain_bound(self, factors, first, radii, size):
        depthwise = depthwise_norm_bound(factors.kernels["kernel1"] * factors.scales["norm1"])
        pointwise = conv_norm_bound(factors.kernels["kernel2"] * factors.scales["norm2"])
        second = radii[0] * math.sqrt(math.prod(size) * self.width_in)
        return StepBound(depthwise * pointwise, pointwise * (depthwise * first + second))

    def spread(self, norms, e):
        return operators.conv(operators.conv(e, norms["kernel1"], dilation=self.dilation), norms["kernel2"])

    def step(self, x, variables, step_size, call):
        kernels = call.kernels()
        xq = call.activation(x, 0, signed=self.signed_inputs)
        hidden = call.conv(xq, 0, kernels, "kernel1", operators.depthwise, dilation=self.dilation)
        z = call.batch_norm("norm1", hidden)
        z = call.activation(call.smooth(jax.nn.relu(z)), 1)
        return call.smooth(jax.nn.relu(call.batch_norm("norm2", call.conv(z, 1, kernels, "kernel2"))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledBlock(ConvBlock):
    """The mean over all pixels, a 1x1 convolution, norm and ReLU: the context of the whole image, as one pixel."""

    taps: int = 1

    def output_size(self, height, width):
        return 1, 1

    def macs(self, height, width):
        return super().macs(1, 1)

    def step_bound(self, factors, bits, size):
        lipschitz, injected = super().step_bound(factors, bits, (1, 1))
        return StepBound(lipschitz / math.sqrt(math.prod(size)), injected)

    def spread(self, norms, e):
        return operators.conv(e.mean((1, 2), keepdims=True), norms["kernel1"])

    def step(self, x, variables, step_size, call):
        xq = call.activation(x.mean((1, 2), keepdims=True), 0, signed=self.signed_inputs)
        return jax.nn.relu(call.batch_norm("norm1", call.conv(xq, 0, call.kernels(), "kernel1")))
