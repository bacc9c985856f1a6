"""Linen layers that round, smooth, or take a non-expansive step, for users' own modules.

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False, bits=None):
            x = qpde.nn.QuantConv(16, weights=4, activations=4)(x, bits=bits)
            x = qpde.nn.SymmetricStep(norm="spectral", weights=4, activations=4)(x, train=train, bits=bits)
            return qpde.nn.QuantDense(10, weights=4, activations=4)(x.mean((1, 2)), bits=bits)

`bits` may be traced, and None takes the layer's own. Clips are parameters beside the kernel. `qpde.quantized(Net())`
makes a network of it that every function of qpde takes; then the module need not hand `bits` on to its layers.

The layers compose inside `nn.scan` and `nn.remat`, under jit, vmap and shard_map. Inside `nn.scan` the parameters are
stacked: `variable_axes={"params": 0}`, with "batch_stats" and "spectral" too for a `SymmetricStep`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from qpde import operators
from qpde.bits import Bits
from qpde.models.images.blocks import BasicBlock
from qpde.models.images.stages import Stage
from qpde.models.layers import Mode, Observe
from qpde.models.options import LIPSCHITZ_TARGET, Smoothing
from qpde.nn.rounding import rounded_input, rounded_kernel, smoothed
from qpde.nn.rules import LayerQuantizers

__all__ = [
    "GradientStep",
    "QuantActivation",
    "QuantConv",
    "QuantDense",
    "QuantDepthwise",
    "QuantLayer",
    "SymmetricStep",
    "TVSmoothing",
]


class QuantLayer(nn.Module, kw_only=True):
    """What the layers that round share.

    Attributes:
      weights: Bits of the kernel, 2 to 32. None: exact.
      activations: Bits of the input, 2 to 32. None: exact.
      signed: Whether the input can be negative. An input that is clipped at 0 wrongly is lost, so True is the default;
        say False behind a ReLU, for twice the levels.
      levels: "uniform", "pot" or "apot".
      per_channel: A clip for each output channel of the kernel.
      standardize: Give the kernel mean 0 and variance 1 before it is rounded.
      smoothing: Total-variation smoothing of the input before its quantizer.
    """

    weights: int | None = None
    activations: int | None = None
    signed: bool = True
    levels: str = "uniform"
    per_channel: bool = False
    standardize: bool = False
    smoothing: Smoothing | None = None

    @property
    def quantizers(self) -> LayerQuantizers:
        """Its quantizers; ValueError for an option out of range."""
        names = [field.name for field in dataclasses.fields(LayerQuantizers)]
        return LayerQuantizers(**{name: getattr(self, name) for name in names})

    def _bits(self, bits: Bits | None) -> Bits:
        return Bits(self.weights, self.activations) if bits is None else bits

    def _input(self, x, bits, observe):
        return rounded_input(self, x, self.quantizers, self._bits(bits).activations, observe, signed=self.signed)

    def _kernel(self, init, shape, bits, observe):
        kernel = self.param("kernel", init, shape)
        return rounded_kernel(self, kernel, self.quantizers, self._bits(bits).weights, observe)

    def _biased(self, y, use_bias):
        if not use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (y.shape[-1],))
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape).astype(y.dtype)


class QuantDense(QuantLayer):
    """Dense layer x W + b over the last axis, with rounded x and W.

    Attributes:
      features: Channels of the output.
      use_bias: Whether to add b, which is exact.
      kernel_init: Initializer of W, (C_in, C_out).
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, *, bits: Bits | None = None, observe: Observe | None = None) -> Array:
        """(..., features) from x (..., C).

        Args:
          x: Floating.
          bits: Bits of this call, scalars, traced or not. None: the layer's own.
          observe: Sees what is rounded, see `qpde.models.layers.Observe`; records go to the collection "observed".
        """
        kernel = self._kernel(self.kernel_init, (x.shape[-1], self.features), bits, observe)
        return self._biased(self._input(x, bits, observe) @ kernel, self.use_bias)


class QuantConv(QuantLayer):
    """Convolution of images by `qpde.operators.conv`, fast on CPUs and inside `nn.scan`, with rounded input and kernel.

    For other ranks, groups or even kernels, wrap an `nn.Conv` by `qpde.quantized`.

    Attributes:
      features: Channels of the output.
      kernel_size: Height and width of the kernel, odd.
      stride: 1 or more.
      padding: Zeros on each side. None keeps the size at stride 1.
      dilation: Distance of the kernel's taps.
      use_bias: Whether to add a bias, which is exact.
      kernel_init: Initializer of the kernel, (kh, kw, C_in, C_out).
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int | None = None
    dilation: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, *, bits: Bits | None = None, observe: Observe | None = None) -> Array:
        """(N, H', W', features) from images (N, H, W, C); arguments as for `QuantDense`."""
        kernel = self._kernel(self.kernel_init, (*self.kernel_size, x.shape[-1], self.features), bits, observe)
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return self._biased(operators.conv(self._input(x, bits, observe), kernel, **options), self.use_bias)


class QuantDepthwise(QuantLayer):
    """Depthwise convolution of images by `qpde.operators.depthwise`, with rounded input and kernel.

    Attributes:
      kernel_size: Height and width of the kernel, odd.
      stride: 1 or more.
      padding: Zeros on each side. None keeps the size at stride 1.
      dilation: Distance of the kernel's taps.
      use_bias: Whether to add a bias, which is exact.
      kernel_init: Initializer of the kernel, (kh, kw, 1, C).
    """

    kernel_size: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int | None = None
    dilation: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, *, bits: Bits | None = None, observe: Observe | None = None) -> Array:
        """(N, H', W', C) from images (N, H, W, C); arguments as for `QuantDense`."""
        kernel = self._kernel(self.kernel_init, (*self.kernel_size, 1, x.shape[-1]), bits, observe)
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return self._biased(operators.depthwise(self._input(x, bits, observe), kernel, **options), self.use_bias)


class QuantActivation(QuantLayer):
    """The quantizer of an activation alone, with its learned clip. The options of kernels have no effect."""

    @nn.compact
    def __call__(self, x: Array, *, bits: Bits | None = None, observe: Observe | None = None) -> Array:
        """x (..., C), smoothed and rounded; arguments as for `QuantDense`."""
        return self._input(x, bits, observe)


class TVSmoothing(nn.Module):
    """Total-variation smoothing of feature maps: explicit steps down a convex energy, see `qpde.stencils`.

    Attributes:
      smoothing: Kind, number and size of the steps. A learned size is the parameter "gamma2_share", the share of the
        largest stable step; `qpde.project` keeps it in [0, 1].
      boundary: "neumann", "periodic" or "dirichlet".
    """

    smoothing: Smoothing = Smoothing()
    boundary: str = "neumann"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Smoothed x (..., H, W, C), same shape and dtype."""
        return smoothed(self, x, self.smoothing, self.boundary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientStep(BasicBlock):
    """x - h K^T s(K x) as a part of an image network: a symmetric block without a ReLU behind it.

    Attributes:
      taps: Side of the kernel, odd.
    """

    taps: int = 3

    has_signed_inputs = True
    has_projection = False
    keeps_width = True

    def kernel_shapes(self):
        return {"kernel1": (self.taps, self.taps, self.width_in, self.hidden)}

    def composed_kernel(self, kernels):
        return kernels["kernel1"], self.taps // 2

    def step(self, x, variables, step_size, call):
        xq = call.activation(x, 0, signed=self.signed_inputs)
        shortcut = call.shortcut(x, xq, signed=self.signed_inputs)
        return call.smooth_output(shortcut - self.symmetric_branch(xq, call.kernels(), variables, step_size, call))


class SymmetricStep(QuantLayer):
    """The step x - h K^T s(K x), s a batch-normalised ReLU, on images: one kernel for K and its exact adjoint.

    With D the norm's scale, the step is

        separate   x - h N2(K^T s(N1(K x))), as published; neither symmetric nor non-expansive
        tied       x - h K^T D s(D K x + b): a gradient step on a convex energy, non-expansive for h |D K|^2 <= 2
        spectral   the same with D = g sqrt(c) / |g K| and h = 1: non-expansive whatever is learned

    where c is `lipschitz_target`, at most 2. |g K| is followed by a power iteration, whose vector is carried in the
    collection "spectral": make it mutable in training. Rounding x and s(..) adds noise, which the steps that follow
    carry along and never amplify. Several equal steps are stacked and run by `qpde.integrators.integrate`.

    Attributes:
      hidden: Channels of K x. None: those of x.
      steps: Number of steps, each with parameters of its own, stacked on a leading axis.
      taps: Side of the kernel, odd.
      norm: "separate", "tied" or "spectral".
      step_size: h of the separate and the tied norm; "auto" holds h |D K|^2 at `lipschitz_target` (tied).
      lipschitz_target: c, above 0 and at most 2.
      residual: "rounded": x itself is rounded; "precise": only where it enters K.
      loop: Over the steps: "scan", "unroll" or "auto".
      remat: Recompute each step in the backward pass.
      momentum: Share of the running statistics that is kept.
    """

    hidden: int | None = None
    steps: int = 1
    taps: int = 3
    norm: str = "spectral"
    step_size: float | str = 0.1
    lipschitz_target: float = LIPSCHITZ_TARGET
    residual: str = "rounded"
    loop: str = "auto"
    remat: bool = False
    momentum: float = 0.9

    def block(self, channels: int) -> GradientStep:
        """One step on maps of so many channels, as a part of an image network.

        Raises:
          ValueError: an option that is unknown or out of range.
        """
        if self.norm not in ("separate", "tied", "spectral") or self.residual not in ("rounded", "precise"):
            raise ValueError(
                f"norm (={self.norm!r}) must be 'separate', 'tied' or 'spectral', residual (={self.residual!r}) "
                "'rounded' or 'precise'"
            )
        if not 0 < self.lipschitz_target <= 2:
            raise ValueError(f"lipschitz_target (={self.lipschitz_target}) must be above 0 and at most 2")
        if self.taps % 2 == 0 or min(self.taps, self.steps) < 1:
            raise ValueError(f"taps (={self.taps}) must be odd and steps (={self.steps}) at least 1")
        is_auto = self.step_size == "auto"
        if (is_auto and self.norm != "tied") or not (is_auto or 0 < float(self.step_size) < math.inf):
            raise ValueError(f"step_size (={self.step_size!r}) must be positive, or 'auto' with norm='tied'")
        if self.smoothing is not None and self.smoothing.learned:
            raise ValueError("a SymmetricStep does not learn its smoothing: put a TVSmoothing beside it")
        checked: dict[str, Any] = {  # names of choices, which are plain strings in a user's module
            "norm": self.norm,
            "residual": self.residual,
            "levels": self.quantizers.levels,
            "step_size": self.step_size if is_auto else float(self.step_size),
        }
        return GradientStep(
            width_in=channels,
            width_out=channels,
            stride=1,
            symmetric=True,
            expansion=1 if self.hidden is None else self.hidden / channels,
            taps=self.taps,
            standardize=self.standardize,
            per_channel=self.per_channel,
            signed_inputs=self.signed,
            lipschitz_target=self.lipschitz_target,
            smoothing=self.smoothing,
            **checked,
        )

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        bits: Bits | None = None,
        observe: Observe | None = None,
        momentum: float | None = None,
        power_iterations: int = 1,
    ) -> Array:
        """Images of the shape of x after all steps.

        Args:
          x: (N, H, W, C) float32.
          train: Normalise by the batch's statistics; the running ones change where "batch_stats" is mutable.
          bits: Bits of this call, scalars or one value for each step. None: the layer's own.
          observe: Sees what is rounded, see `qpde.models.layers.Observe`.
          momentum: Share of the running statistics that is kept. None: the layer's own.
          power_iterations: Iterations of every spectral norm, from the carried vector on.
        """
        stage = Stage((self.block(x.shape[-1]),) * self.steps, 0, self.loop, self.remat, name="steps")
        nn.share_scope(self, stage)
        mode = Mode(train, self.momentum if momentum is None else momentum, observe, power_iterations)
        return stage(x, self._bits(bits), mode, None, False)[0]


def kernel_macs(module: QuantLayer, x: Any, y: Any, kernel: Any) -> Any:
    """Multiply-accumulates of one call of a layer, from the shapes of its input, output and kernel."""
    if isinstance(module, SymmetricStep):
        pixels = math.prod(x.shape[:-1])
        return module.steps * pixels * sum(module.block(x.shape[-1]).macs(1, 1).values())
    return 0 if kernel is None else math.prod(y.shape) * math.prod(kernel.shape) // kernel.shape[-1]
