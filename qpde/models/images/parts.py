"""Parts of an image network: stem, blocks, neck and head, each a pure description that is called with its variables.

A part knows everything that is said about it anywhere: its formula, its output, its costs, its Lipschitz constants, and
the names of its published weights. The forward pass, the certificate, the summary and the import of published weights
go through one list of parts, `Network.parts`. A new kind of layer is one class here, or in `blocks`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from qpde import operators
from qpde.bits import Bits
from qpde.kernel_norms import conv_norm_bound
from qpde.models.layers import NORM_EPSILON, Mode, divide_by_rms, he_normal, moments, moved, normalize

__all__ = ["ExactConv", "Factors", "Head", "Part", "StepBound", "read_norms"]

Read = Callable[[str], np.ndarray]
"""Published name -> array."""


class StepBound(NamedTuple):
    """Constants of one part, for one image size.

    Attributes:
      lipschitz: Lipschitz constant of the twin's part, in the 2-norm.
      injected: Bound of the error that rounding adds, for every input.
    """

    lipschitz: float
    injected: float


class Factors(NamedTuple):
    """What a part multiplies by in evaluation, as NumPy arrays.

    Attributes:
      kernels: Rounded kernels by name, HWIO.
      scales: Scale D of every norm by name, (C,).
      step_size: h.
      act_clips: Clips of the activations, in their order.
    """

    kernels: dict[str, Any]
    scales: dict[str, Any]
    step_size: Any
    act_clips: Any


class Part(abc.ABC):
    """One element of the list that an image network is.

    Attributes:
      width_in: Channels of the input.
      width_out: Channels of the output.
    """

    width_in: int
    width_out: int

    @property
    def smallest_map(self) -> int:
        """Side of the smallest input that it can take."""
        return 1

    @abc.abstractmethod
    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        """HWIO shape of every kernel by name."""

    @abc.abstractmethod
    def norm_widths(self) -> dict[str, int]:
        """Channels of every batch norm by name."""

    @abc.abstractmethod
    def macs(self, height: int, width: int) -> dict[str, int]:
        """Multiply-accumulates of one input of this size by kernel name, every use of a kernel counted."""

    @abc.abstractmethod
    def __call__(
        self, variables: dict, x: Array, step_size: Any, bits: Bits, mode: Mode, gamma2: Any = None
    ) -> tuple[Array, dict]:
        """Output of the part, and the collections that the call changed.

        Args:
          variables: This part's own: {"params", "batch_stats"[, "spectral"]}.
          x: (N, H, W, width_in).
          step_size: Scalar h. Only symmetric blocks that do not find their own use it.
          bits: Scalars or None. Only blocks round.
          mode: How this call of the network runs.
          gamma2: Step of the smoothing, None for no smoothing. Only blocks smooth.
        """

    @abc.abstractmethod
    def step_bound(self, factors: Factors, bits: Bits, size: tuple[int, int]) -> StepBound:
        """Lipschitz constant of the twin's part and the error that rounding injects, both proven.

        Args:
          factors: What the part multiplies by.
          bits: Scalars.
          size: Height and width of the input.
        """

    @abc.abstractmethod
    def torch_names(self) -> dict[str, str]:
        """Published name by own name, for every kernel ("kernel1") and norm ("norm1")."""

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') that the part makes of (H, W)."""
        return height, width

    def output_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the output of one input of this size."""
        return (*self.output_size(height, width), self.width_out)

    def factors(self, variables: dict, step_size: Any, bits: Bits) -> tuple[dict, dict, Any]:
        """Kernels, scales and step size of `Factors`, traced."""
        del bits
        params, stats = variables["params"], variables["batch_stats"]
        kernels = {name: params[name] for name in self.kernel_shapes()}
        return kernels, {name: norm_scale(params[name], stats[name]) for name in self.norm_widths()}, step_size

    @property
    def parameters(self) -> int:
        """Trainable numbers, clips not counted."""
        return sum(math.prod(shape) for shape in self.kernel_shapes().values()) + 2 * sum(self.norm_widths().values())

    def read_params(self, read: Read, at: str) -> dict:
        """Parameters from published arrays; `at` is put before their names."""
        names = self.torch_names()
        kernels = {k: read(f"{at}{names[k]}").transpose(2, 3, 1, 0) for k in self.kernel_shapes()}
        norms = {
            n: {"scale": read(f"{at}{names[n]}.weight"), "bias": read(f"{at}{names[n]}.bias")}
            for n in self.norm_widths()
        }
        return kernels | norms

    def read_statistics(self, read: Read, at: str) -> dict:
        """Batch statistics from published arrays."""
        return read_norms(read, {norm: f"{at}{self.torch_names()[norm]}" for norm in self.norm_widths()})


@dataclasses.dataclass(frozen=True)
class ExactConv(Part):
    """Convolution, batch norm and ReLU in full precision: a network's stem, or its neck before the pooling.

    Attributes:
      taps: Side of the kernel, odd.
      torch_kernel: Published name of the kernel.
      torch_norm: Published name of the norm.
      stride: Stride of the convolution.
    """

    width_in: int
    width_out: int
    taps: int
    torch_kernel: str
    torch_norm: str
    stride: int = 1

    def output_size(self, height, width):
        return -(-height // self.stride), -(-width // self.stride)

    def kernel_shapes(self):
        return {"kernel": (self.taps, self.taps, self.width_in, self.width_out)}

    def norm_widths(self):
        return {"norm": self.width_out}

    def macs(self, height, width):
        return {"kernel": math.prod(self.output_size(height, width)) * math.prod(self.kernel_shapes()["kernel"])}

    def torch_names(self):
        return {"kernel": self.torch_kernel, "norm": self.torch_norm}

    def init(self, key: PRNGKeyArray) -> tuple[dict, dict]:
        """Parameters (He normal kernel, unit norm) and batch statistics."""
        ones, zeros = jnp.ones(self.width_out), jnp.zeros(self.width_out)
        params = {"kernel": he_normal(key, self.kernel_shapes()["kernel"]), "norm": {"scale": ones, "bias": zeros}}
        return params, {"norm": {"mean": zeros, "var": ones}}

    def __call__(self, variables, x, step_size, bits, mode, gamma2=None):
        params, stats = variables["params"], variables["batch_stats"]
        hidden = operators.conv(x, params["kernel"].astype(mode.compute_dtype), stride=self.stride)
        mean, var, updated = moments(hidden, stats["norm"], mode)
        return jax.nn.relu(normalize(hidden, params["norm"], mean, var)), {"batch_stats": {"norm": updated}}

    def step_bound(self, factors, bits, size):
        return StepBound(conv_norm_bound(factors.kernels["kernel"] * factors.scales["norm"]), 0.0)


@dataclasses.dataclass(frozen=True)
class Head(Part):
    """Global average pool and dense layer, in full precision.

    Attributes:
      width_out: Number of classes.
      kind: "dense", or "scaled": the pooled features are first divided by their root mean square, one number.
    """

    width_in: int
    width_out: int
    kind: str = "dense"

    def kernel_shapes(self):
        return {"kernel": (self.width_in, self.width_out)}

    def norm_widths(self):
        return {}

    @property
    def parameters(self):
        return (self.width_in + 1) * self.width_out

    def output_shape(self, height, width):
        return (self.width_out,)

    def macs(self, height, width):
        return {"kernel": self.width_in * self.width_out}

    def torch_names(self):
        return {"kernel": "dense_output"}

    def read_params(self, read, at):
        return {"kernel": read(f"{at}dense_output.weight").T, "bias": read(f"{at}dense_output.bias")}

    def initial_statistics(self) -> dict:
        """Batch statistics before the first batch."""
        return {"mean_square": jnp.ones(())} if self.kind == "scaled" else {}

    def __call__(self, variables, x, step_size, bits, mode, gamma2=None):
        params, pooled, updates = variables["params"], x.mean((1, 2)), {}
        if self.kind == "scaled":
            old = variables["batch_stats"]["mean_square"]
            own = old
            if mode.train and pooled.size:
                own = jnp.mean(pooled * pooled)
                updates = {"batch_stats": {"mean_square": moved(old, jax.lax.stop_gradient(own), mode.momentum)}}
            pooled = divide_by_rms(pooled, own)
        return pooled @ params["kernel"] + params["bias"][None], updates

    def factors(self, variables, step_size, bits):
        scale = jnp.ones(())
        if self.kind == "scaled":
            scale = divide_by_rms(scale, variables["batch_stats"]["mean_square"])
        return {"kernel": variables["params"]["kernel"]}, {"pooled": scale}, step_size

    def feature_gain(self, factors: Factors, size: tuple[int, int]) -> float:
        """Lipschitz constant from the last feature map, of this size, to what the dense layer takes."""
        return float(factors.scales["pooled"]) / math.sqrt(size[0] * size[1])

    def step_bound(self, factors, bits, size):
        return StepBound(self.feature_gain(factors, size) * float(np.linalg.norm(factors.kernels["kernel"], 2)), 0.0)


def norm_scale(params: dict, statistics: dict) -> Float[Array, " c"]:
    """D of a batch norm in evaluation: scale / sqrt(var + 1e-5)."""
    return params["scale"] * jax.lax.rsqrt(statistics["var"] + NORM_EPSILON)


def read_norms(read: Read, names: dict[str, str]) -> dict:
    """Running statistics of norms from published arrays, by own name."""
    return {own: {"mean": read(f"{at}.running_mean"), "var": read(f"{at}.running_var")} for own, at in names.items()}
