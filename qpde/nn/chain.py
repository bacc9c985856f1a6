"""A user's own chain of parts, of which constants are proven, so that `qpde.certify` takes it.

    net = qpde.nn.Chain((
        qpde.nn.QuantConv(16), nn.BatchNorm(), nn.relu,
        qpde.nn.SymmetricStep(steps=3, residual="precise"),
        qpde.nn.global_mean, nn.Dense(10),
    ))
    model = qpde.quantized(net, [qpde.Rule("layers_5", leave_alone=True)])

What is proven of a part, in the 2-norm over one whole input:

    dense, convolution        |K|, by `qpde.kernel_norms`, a batch norm behind it included
    SymmetricStep             1 for the tied and the spectral norm within their step size, see `qpde.certify`
    batch norm                its largest factor
    clip, convex smoothing, ReLU and its relatives    1
    Proven, an own layer      what it says of itself

A quantizer moves its input by at most r sqrt(n), r its largest error and n the numbers of one input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qpde.bits import LARGEST_BITS, Bits
from qpde.kernel_norms import conv_norm_bound, depthwise_norm_bound
from qpde.models.images.parts import Factors, StepBound, check_convex, rounding_radius
from qpde.models.layers import Mode
from qpde.nn.layers import (
    GradientStep,
    QuantActivation,
    QuantConv,
    QuantDense,
    QuantDepthwise,
    QuantLayer,
    SymmetricStep,
    TVSmoothing,
)
from qpde.nn.modes import training_arguments
from qpde.nn.rounding import rounded_input, rounded_kernel
from qpde.nn.rules import LayerQuantizers

__all__ = ["BoundLink", "Chain", "Link", "Proven", "flatten", "global_mean", "links_of"]

FUNCTIONS: dict[Any, float] = {
    nn.relu: 1.0,
    nn.relu6: 1.0,
    nn.leaky_relu: 1.0,
    nn.elu: 1.0,
    nn.softplus: 1.0,
    nn.hard_tanh: 1.0,
    nn.tanh: 1.0,
    jnp.tanh: 1.0,
    jnp.abs: 1.0,
    nn.sigmoid: 0.25,
    nn.gelu: 1.13,
    nn.silu: 1.1,
}
"""Functions of single numbers, and the largest slope of each."""


@dataclasses.dataclass(frozen=True)
class Proven:
    """A function as a part of a chain, with a Lipschitz constant that you have proven.

    Attributes:
      function: An array (N, ...) to an array (N, ...), each input by itself.
      lipschitz: Its constant in the 2-norm over one input, or a function of (variables, shape of one input).

    >>> double = Proven(lambda x: 2 * x, lipschitz=2.0)
    >>> float(double(1.5))
    3.0
    """

    function: Callable[[Any], Any]
    lipschitz: float | Callable[[Any, tuple[int, ...]], float]

    def __call__(self, x: Any) -> Any:
        """The function of x."""
        return self.function(x)


global_mean = Proven(
    lambda x: x.mean(tuple(range(1, x.ndim - 1))), lambda _, shape: 1 / math.sqrt(math.prod(shape[:-1]))
)
"""Mean over all pixels, (N, ..., C) -> (N, C)."""

flatten = Proven(lambda x: x.reshape(len(x), -1), 1.0)
"""All numbers of an input in a row, (N, ...) -> (N, n)."""


class Chain(nn.Module):
    """Layers and functions one after the other, each called with what the last one returned.

    As `nn.Sequential`, but that `train` reaches every layer, by the name that it has for it. `qpde.quantized` rounds it
    by rules as any module, at the paths "layers_0", "layers_1" and so on, and `qpde.certify.certify` takes the result.

    Attributes:
      layers: Linen modules and functions of one array. To be certified: layers of `qpde.nn`, `nn.Conv` with zeros as
        borders, `nn.Dense`, `nn.BatchNorm`, `nn.Dropout`, `Proven`, a `Chain`, `nn.relu` and other functions in
        `FUNCTIONS`, or an exact layer of your own with an attribute `lipschitz` as that of `Proven`.
    """

    layers: Sequence[Callable[..., Any]]

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        """Output of the last layer.

        Args:
          x: (N, ...).
          train: Passed on, see `qpde.quantized`.
        """
        for layer in self.layers:
            x = layer(x, **training_arguments(layer, train))
        return x


class Link(Protocol):
    """What `qpde.certify` asks of a part of a chain: a description that is called with its variables."""

    def run(self, variables: Any, x: Any, bits: Bits) -> Any:
        """Output of the quantized part."""

    def rounded(self, variables: Any, bits: Bits) -> Any:
        """The variables with kernels as they are rounded."""

    def twin(self, rounded: Any, x: Any) -> Any:
        """Output of the part whose activations are clipped and not rounded, in the dtype of x."""

    def factors(self, rounded: Any) -> Any:
        """What `bound` needs, as arrays."""

    def bound(self, factors: Any, bits: Bits, shape: tuple[int, ...]) -> StepBound:
        """Proven constants.

        Args:
          factors: NumPy arrays of float64.
          bits: Scalars.
          shape: Shape of one input.
        """

    def class_kernel(self, rounded: Any) -> Any:
        """(C, classes) of a dense layer, or None."""


class BoundLink(NamedTuple):
    """A part with its own variables and bits."""

    link: Link
    variables: Any
    bits: Bits


@dataclasses.dataclass(frozen=True)
class ExactLink:
    """A part that rounds nothing: a function, or a layer, at a path that messages name."""

    path: str
    layer: Any

    def __hash__(self):
        return hash((type(self), self.path))  # fields of a user's module may be lists

    def run(self, variables, x, bits):
        return _evaluated(self.layer, variables, x)

    def rounded(self, variables, bits):
        return variables

    def twin(self, rounded, x):
        return _evaluated(self.layer, rounded, x)

    def factors(self, rounded):
        return rounded

    def bound(self, factors, bits, shape):
        layer, stated = self.layer, self.stated
        if isinstance(layer, nn.BatchNorm):
            return StepBound(float(np.abs(_norm_scale(layer, factors)).max()), 0.0)
        return StepBound(float(stated(factors, shape) if callable(stated) else stated), 0.0)

    def class_kernel(self, rounded):
        return None

    @property
    def stated(self) -> Any:
        """Its constant, or a function of (variables, shape of one input) that gives it.

        Raises:
          ValueError: None is proven.
        """
        layer = self.layer
        if isinstance(layer, TVSmoothing):
            check_convex(layer.smoothing)
        if type(layer) in (TVSmoothing, nn.Dropout, nn.BatchNorm):
            return 1.0
        found = getattr(layer, "lipschitz", None)
        known = [constant for function, constant in FUNCTIONS.items() if layer is function]
        if found is None and not known:
            raise ValueError(
                f"no Lipschitz constant is proven of {self.path} ({_name(layer)}), so there is no certificate: put a "
                "qpde.nn.Proven(function, lipschitz) in its place, or give your layer an attribute `lipschitz`"
            )
        return known[0] if found is None else found


@dataclasses.dataclass(frozen=True)
class KernelLink:
    """Smoothing, a quantizer, a layer with a kernel, and the batch norm behind it.

    Its variables are those of "layer" and "norm".

    Attributes:
      path: Its path, for messages.
      layer: With a kernel, or None for a quantizer alone.
      settings: What it rounds. None: nothing.
      signed: Whether its input can be negative.
      norm: The batch norm, or None.
    """

    path: str
    layer: nn.Module | None
    settings: LayerQuantizers | None
    signed: bool
    norm: nn.BatchNorm | None

    def __hash__(self):
        return hash((type(self), self.path, self.settings))

    def run(self, variables, x, bits):
        return self._linear(self.rounded(variables, bits), self._input(variables, x, bits.activations))

    def rounded(self, variables, bits):
        if self.settings is None or self.layer is None or bits.weights is None:
            return variables
        own = variables["layer"]["params"]
        kernel = _Kernel(self.settings).apply({"params": own}, bits.weights)
        return {**variables, "layer": {**variables["layer"], "params": {**own, "kernel": kernel}}}

    def twin(self, rounded, x):
        return self._linear(rounded, self._input(rounded, x, LARGEST_BITS))

    def factors(self, rounded):
        own = rounded["layer"]["params"]
        kernel = None if self.layer is None else own["kernel"]
        if kernel is not None and self.norm is not None:
            scale = jnp.broadcast_to(_norm_scale(self.norm, rounded["norm"]), kernel.shape[-1:])
            kernel = kernel * scale.reshape((1,) * (kernel.ndim - 1) + (-1,))
        return {"kernel": kernel, "clip": own.get("act_clips")}

    def bound(self, factors, bits, shape):
        norm = 1.0 if self.layer is None else self._norm(factors["kernel"])
        if self.settings is None:
            return StepBound(norm, 0.0)
        radius = rounding_radius(factors["clip"], bits.activations, levels=self.settings.levels, signed=self.signed)
        return StepBound(norm, norm * radius * math.sqrt(math.prod(shape)))

    def class_kernel(self, rounded):
        if type(self.layer) not in (nn.Dense, QuantDense) or self.norm is not None:
            return None
        return rounded["layer"]["params"]["kernel"]

    def _input(self, variables, x, bits):
        if self.settings is None:
            return x
        return _Input(self.settings, self.signed).apply({"params": variables["layer"]["params"]}, x, bits)

    def _linear(self, variables, x):
        if self.layer is not None:
            exact: dict[str, Any] = {"bits": Bits()} if isinstance(self.layer, QuantLayer) else {}
            x = self.layer.apply({"params": variables["layer"]["params"]}, x, **exact)
        return x if self.norm is None else _evaluated(self.norm, variables["norm"], x)

    def _norm(self, kernel) -> float:
        if type(self.layer) in (nn.Dense, QuantDense):
            return float(np.linalg.norm(kernel, 2))
        groups = getattr(self.layer, "feature_group_count", 1)
        kernel = _with_odd_taps(kernel.reshape((1,) * (4 - kernel.ndim) + kernel.shape))
        points = max(32, 4 * max(kernel.shape[:2]))
        if type(self.layer) is QuantDepthwise or groups == kernel.shape[3] > 1:
            return depthwise_norm_bound(kernel, points=points)
        return max(conv_norm_bound(part, points=points) for part in np.split(kernel, groups, axis=3))


@dataclasses.dataclass(frozen=True)
class StepLink:
    """One step of a `SymmetricStep`."""

    part: GradientStep

    def run(self, variables, x, bits):
        return self._apply(variables, x, bits, Mode())

    def rounded(self, variables, bits):
        kernels, _, _ = self.part.factors(variables, self._step_size, bits)
        return {**variables, "params": variables["params"] | kernels}

    def twin(self, rounded, x):
        return self._apply(rounded, x, Bits(None, LARGEST_BITS), Mode(compute_dtype="float64"))

    def factors(self, rounded):
        return Factors(*self.part.factors(rounded, self._step_size, Bits()), rounded["params"]["act_clips"])

    def bound(self, factors, bits, shape):
        return self.part.step_bound(factors, bits, shape[:2])

    def class_kernel(self, rounded):
        return None

    @property
    def _step_size(self):
        return self.part.step_size if isinstance(self.part.step_size, float) else 1.0

    def _apply(self, variables, x, bits, mode):
        gamma2 = None if self.part.smoothing is None else self.part.smoothing.gamma2
        return self.part(variables, x, self._step_size, bits, mode, gamma2)[0]


def links_of(
    chain: Chain, variables: Mapping[str, Any], x: Any, layers: Mapping[str, tuple[LayerQuantizers, bool, Bits]]
) -> list[BoundLink]:
    """The parts of a chain, each with its own variables and bits: called one after the other they are the chain.

    Args:
      chain: As it is.
      variables: Its collections.
      x: An input, of which only shape and dtype count.
      layers: What the layers at their paths round: settings, whether their input can be negative, and bits.
    Raises:
      ValueError: A part of which no constant is proven; the message says why.
    """
    found: list[BoundLink] = []
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    for path, layer in _flat(chain, ()):
        own = _own(variables, path)
        shape, channels = jax.eval_shape(partial(_evaluated, layer), own, shape), shape.shape[-1]
        found += _links("/".join(path), layer, own, channels, layers, found)
    return found


def _links(path, layer, own, channels, layers, before) -> list[BoundLink]:
    """The links of one layer; a batch norm changes the link that it stands behind."""
    settings, signed, bits = layers.get(path, (None, True, Bits()))
    if settings is not None and settings.smoothing is not None:
        check_convex(settings.smoothing)
    if isinstance(layer, SymmetricStep):
        part, (stack,) = layer.block(channels), own["params"]
        stacked = {name: tree[stack] for name, tree in own.items() if stack in tree}
        steps = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(layer.steps)]
        return [BoundLink(StepLink(part), step, bits) for step in steps]
    if type(layer) is QuantActivation:
        return [BoundLink(KernelLink(path, None, settings, signed, None), {"layer": own}, bits)]
    if type(layer) in (nn.Dense, nn.Conv, QuantDense, QuantConv, QuantDepthwise):
        _check_linear(path, layer, own)
        return [BoundLink(KernelLink(path, layer, settings, signed, None), {"layer": own}, bits)]
    if type(layer) is nn.BatchNorm and layer.axis == -1 and before and isinstance(before[-1].link, KernelLink):
        last = before.pop()
        if last.link.layer is not None and last.link.norm is None:
            link = dataclasses.replace(last.link, norm=layer)
            return [BoundLink(link, {**last.variables, "norm": own}, last.bits)]
        before.append(last)
    if inside := [other for other in layers if other.startswith(f"{path}/")]:
        raise ValueError(
            f"{path} ({_name(layer)}) rounds inside, at {', '.join(inside)}, and only parts of a chain can: make these "
            "layers parts of the chain, or leave them alone by a rule"
        )
    link = ExactLink(path, layer)
    _ = link.stated  # finds out whether there is a constant
    return [BoundLink(link, own, bits)]


class _Kernel(nn.Module):
    """A kernel as it is rounded."""

    settings: LayerQuantizers

    def __call__(self, bits):
        return rounded_kernel(self, self.get_variable("params", "kernel"), self.settings, bits)


class _Input(nn.Module):
    """An input as it is smoothed and rounded."""

    settings: LayerQuantizers
    signed: bool

    def __call__(self, x, bits):
        return rounded_input(self, x, self.settings, bits, signed=self.signed)


def _flat(chain, path):
    """Layers with their paths; a chain in a chain is its layers."""
    for index, layer in enumerate(chain.layers):
        place = (*path, f"layers_{index}")
        if isinstance(layer, Chain):
            yield from _flat(layer, place)
        else:
            yield place, layer


def _own(variables, path):
    """Collections of the layer at a path."""
    found = {}
    for name, tree in variables.items():
        for key in path:
            tree = tree.get(key, {}) if isinstance(tree, Mapping) else {}
        if tree:
            found[name] = tree
    return found


def _evaluated(layer, variables, x):
    if not isinstance(layer, nn.Module):
        return layer(x)
    arguments: dict[str, Any] = training_arguments(layer, False)
    return layer.apply(variables, x, **arguments)


def _check_linear(path, layer, own):
    """ValueError for a layer whose norm the bounds do not cover."""
    kernel, padding = own["params"]["kernel"], getattr(layer, "padding", None)
    why = None
    if isinstance(padding, str) and padding not in ("SAME", "VALID", "CAUSAL", "CIRCULAR"):
        why = f"its borders are {padding}, not zeros"
    elif kernel.ndim > 4:
        why = "it has more than two dimensions"
    elif getattr(layer, "mask", None) is not None:
        why = "its kernel is masked"
    elif getattr(layer, "dtype", None) not in (None, jnp.float32, np.dtype("float32")):
        why = f"it computes in {jnp.dtype(layer.dtype)}, which rounds more than activations"
    elif any(
        getattr(layer, name, None)
        for name in ("conv_general_dilated", "conv_general_dilated_cls", "dot_general", "dot_general_cls")
    ):
        why = "it multiplies by a function of your own"
    if why is not None:
        raise ValueError(f"no norm is proven of {path} ({_name(layer)}): {why}")


def _norm_scale(norm, variables):
    """Factor of a batch norm in evaluation, (C,)."""
    variance = variables["batch_stats"]["var"]
    return variables.get("params", {}).get("scale", 1.0) / (variance + norm.epsilon) ** 0.5


def _with_odd_taps(kernel):
    """A kernel of even size with a row or a column of zeros more."""
    return np.pad(kernel, [(0, 1 - n % 2) for n in kernel.shape[:2]] + [(0, 0), (0, 0)])


def _name(layer) -> str:
    return type(layer).__name__ if isinstance(layer, nn.Module | Proven) else getattr(layer, "__name__", repr(layer))
