"""One call of a quantized module: every layer with a kernel is intercepted, and rounds its input and its kernel."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from qpde.bits import Bits
from qpde.nn.convolutions import conv_general_dilated
from qpde.nn.kernels import Layer
from qpde.nn.layers import QuantLayer, SymmetricStep, kernel_macs
from qpde.nn.rounding import rounded_input, rounded_kernel
from qpde.nn.rules import check_rules, first_match

__all__ = ["LAYERS", "STATES", "Call", "Layers", "bits_of_layer", "place_of"]

LAYERS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
"""Layers that a rule can quantize, and what is derived from them."""

STATES = "states"
"""The collection in which outputs of layers travel through transforms."""


class Layers(dict):
    """Layers by path, and the path of the one whose output is the network's, or None."""

    output: str | None = None


class Call:
    """One call of a quantized module: what its layers need to know, and what is known of them afterwards.

    Args:
      model: The `QuantizedModule`, bound.
      bits: Bits of the call, or None for those of the rules.
      observe: As `QuantizedModule.__call__` takes it, like all that follows.
      return_states: Whether outputs of layers are kept.
      momentum: Of the batch norms.
      power_iterations: Of the spectral norms.
    """

    def __init__(self, model, bits, observe, return_states, momentum, power_iterations):
        self.model, self.bits, self.observe = model, bits, observe
        self.return_states, self.momentum, self.power_iterations = return_states, momentum, power_iterations
        self.observed = observe is not None and model.is_mutable_collection("observed")
        self.root = len(model.path)
        self.signs = dict(model.signs)
        self.layers = Layers()
        self.visited: set[str] = set()
        self.norms: set[str] = set()
        self.state_names: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self.last: tuple[str, Any] | None = None

    def intercept(self, call_module, args, kwargs, context):
        """What runs in place of every method of every module."""
        module = context.module
        if context.method_name != "__call__":
            return call_module(*args, **kwargs)
        path = "/".join(module.path[self.root :])
        self.visited.add(path)
        if isinstance(module, nn.BatchNorm) and self.momentum is not None:
            self.norms.add(path)
            return self._batch_norm(module, call_module, args, kwargs)
        if isinstance(module, nn.Dropout) and self._is_silent(module):
            return args[0] if args else kwargs["inputs"]
        if isinstance(module, QuantLayer):
            return self._own_layer(module, path, call_module, args, kwargs)
        # What is derived from a layer and calls it by super() is one layer.
        if isinstance(module, LAYERS) and "param" not in vars(module):
            return self._layer(module, path, call_module, args, kwargs)
        return call_module(*args, **kwargs)

    def _layer(self, module, path, call_module, args, kwargs):
        rule = first_match(self.model.rules, path)
        settings = None if rule is None or rule.leave_alone else rule
        bits = self._bits(path, settings)
        name = "inputs" if not args else None
        x, rest = (kwargs[name], ()) if name else (args[0], args[1:])
        equation = _equation(module, rest, kwargs)
        number, kernels = self._number(module), []

        def rounded(kernel):
            kernels.append(kernel)
            if settings is None:
                return kernel
            return rounded_kernel(
                module, kernel, settings, bits.weights, self.observe, _output_axes(module, kernel, equation)
            )

        if settings is not None:
            self._check_carried(module, path)
            self._check_input(module, path, settings, bits, x)
            x = x if jnp.issubdtype(x.dtype, jnp.inexact) or bits.activations is None else x.astype(jnp.float32)
            signed = self.signs.get(path, True) if settings.signed == "auto" else bool(settings.signed)
            x = rounded_input(module, x, settings, bits.activations, self.observe, signed=signed, call=number)
        if name:
            kwargs = {**kwargs, name: x}
        with _kernel_through(module, rounded), _fast_convolution(module, bits):
            y = call_module(*(() if name else (x,)), *rest, **kwargs)
        (kernel,) = kernels
        axes = _output_axes(module, kernel, equation)
        self._record(module, path, settings, kernel.shape, axes, y, _macs(module, x, y, kernel, equation), number)
        return y

    def _own_layer(self, module, path, call_module, args, kwargs):
        """A layer of `qpde.nn`, which rounds by itself; what its call gives takes precedence."""
        settings = module.quantizers
        self._check_carried(module, path)
        bits = self._bits(path, settings)
        options = {"bits": bits, "observe": self.observe}
        if isinstance(module, SymmetricStep):
            options["power_iterations"] = self.power_iterations
            if self.momentum is not None:
                self.norms.add(path)
                options |= {"momentum": self.momentum, "train": True}
        number = self._number(module)
        given = {k: v for k, v in kwargs.items() if v is not None or k not in options}
        given = {k: v for k, v in given.items() if k not in ("train",) or "train" not in options}
        y = call_module(*args, **{**options, **given})
        kernel = module.get_variable("params", "kernel")
        macs = kernel_macs(module, args[0], y, kernel)
        self._record(module, path, settings, None if kernel is None else kernel.shape, (-1,), y, macs, number)
        return y

    def _batch_norm(self, module, call_module, args, kwargs):
        """A batch norm that normalises by its batch and keeps the given share of its running statistics."""
        rest = {k: v for k, v in kwargs.items() if k != "use_running_average"}
        with _attributes(module, momentum=self.momentum, use_running_average=None):
            return call_module(*args[:1], use_running_average=False, **rest)

    def _is_silent(self, module):
        return (self.momentum is not None or self.observe is not None) and not module.has_rng(module.rng_collection)

    def _bits(self, path, settings) -> Bits:
        """Bits of a layer, scalars or None."""
        if settings is None:
            return Bits()
        if self.bits is None:
            return Bits(settings.weights, settings.activations)
        order = [p for p, layer in self.layers.items() if layer.settings is not None]
        index = order.index(path) if path in order else len(order)
        return bits_of_layer(self.bits, index)

    def _number(self, module) -> int:
        """1 for the first call of this module here, 2 for the next; traced again it starts anew."""
        owner, count = vars(module).get("_qpde_calls", (None, 0))
        count = count + 1 if owner is self else 1
        object.__setattr__(module, "_qpde_calls", (self, count))
        return count

    def _record(self, module, path, settings, kernel_shape, output_axes, y, macs, number):
        before = self.layers[path].macs if number > 1 else 0
        self.layers[path] = Layer(path, settings, kernel_shape, output_axes, y.shape, before + macs)
        self.last = (path, y)
        if settings is not None and self.return_states:
            name = f"output{number}"
            module.put_variable(STATES, name, y)
            names = self.state_names.setdefault(path, [])
            if (name, y.shape) not in names:
                names.append((name, y.shape))

    def _check_carried(self, module, path):
        for collection, wanted in ((STATES, self.return_states), ("observed", self.observed)):
            if wanted and not module.is_mutable_collection(collection):
                raise ValueError(
                    f"layer {path!r} runs where the collection {collection!r} is not mutable. Inside nn.scan or "
                    f'nn.vmap add it to the axes: variable_axes={{"params": 0, "{collection}": 0}}. '
                    f'In a module around this one call apply with mutable=["{collection}"]'
                )

    def _check_input(self, module, path, settings, bits, x):
        has_two_axes = x.ndim >= 4 if not hasattr(module, "kernel_size") else np.size(module.kernel_size) == 2
        if settings.smoothing is not None and not has_two_axes:
            raise ValueError(
                f"smoothing is for maps (N, H, W, C), but layer {path!r} takes {x.shape}: give it a rule of its own, "
                "before this one, without smoothing"
            )
        undecided = settings.signed == "auto" and path not in self.signs
        if undecided and self.observe is not None and bits.activations is not None:
            raise ValueError(
                f"whether the input of layer {path!r} can be negative is open (signed='auto'): decide it by "
                "`model = model.with_signs(variables, batches)`, or by `signed` in its rule"
            )

    def finish(self, output):
        """Checks that need to know all layers, and where the output comes from."""
        params = flatten_dict(unfreeze(self.model.variables.get("params", {})))
        others = {"/".join(place[:-1]) for place in params if place[-1] == "kernel"} - self.visited
        check_rules(self.model.rules, [*self.layers, *sorted(others)])
        count = sum(layer.settings is not None for layer in self.layers.values())
        for field, value in zip(Bits._fields, self.bits or Bits(), strict=True):
            if value is not None and np.ndim(value) > 0 and np.shape(value) != (count,):
                raise ValueError(
                    f"bits.{field} has shape {np.shape(value)}; give one value, or one for each of the {count} "
                    "quantized layers"
                )
        if self.last is not None and output is self.last[1]:
            self.layers.output = self.last[0]
        if self.momentum is not None:
            statistics = flatten_dict(unfreeze(self.model.variables.get("batch_stats", {})))
            for place in statistics:
                parents = {"/".join(place[:i]) for i in range(len(place))}
                if not parents & self.norms:
                    raise ValueError(
                        f"batch_stats/{'/'.join(place)} belongs to no nn.BatchNorm: its momentum cannot be chosen"
                    )

    def states(self) -> tuple[jax.Array, ...]:
        """Outputs of the quantized layers, in order."""
        found = flatten_dict(unfreeze(self.model.variables.get(STATES, {})))
        states = []
        for path, names in self.state_names.items():
            for name, shape in names:
                state = found[(*place_of(path), name)]
                states += [state] if state.shape == shape else list(state.reshape(-1, *shape))
        return tuple(states)


@contextlib.contextmanager
def _attributes(module: nn.Module, **values: Any):
    """Attributes of a module that are others for a while."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                object.__setattr__(module, name, before[name])
            else:
                object.__delattr__(module, name)


def _kernel_through(module: nn.Module, change: Callable[[jax.Array], jax.Array]):
    """A module whose kernel, where it asks for it, is changed."""
    plain = module.param

    def param(name, *args, **kwargs):
        value = plain(name, *args, **kwargs)
        return change(value) if name == "kernel" else value

    return _attributes(module, param=param)


def _fast_convolution(module: nn.Module, bits: Bits):
    """An `nn.Conv` that convolves by `qpde.operators`. Where nothing is rounded it stays as it is."""
    rounds = bits.weights is not None or bits.activations is not None
    own = any(getattr(module, name, None) for name in ("conv_general_dilated", "conv_general_dilated_cls"))
    if not rounds or own or not isinstance(module, nn.Conv):
        return contextlib.nullcontext()
    return _attributes(module, conv_general_dilated=conv_general_dilated)


def _equation(module, rest, kwargs) -> str:
    if not isinstance(module, nn.Einsum):
        return ""
    given = rest[0] if rest else kwargs.get("einsum_str")
    return (given or module.einsum_str or "").replace(" ", "")


def _output_axes(module, kernel, equation) -> tuple[int, ...]:
    """Axes of a layer's kernel that are channels of its output."""
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return (-2,)
    if isinstance(module, nn.DenseGeneral):
        return tuple(range(-np.size(module.features), 0))
    if isinstance(module, nn.Einsum):
        inputs, result = equation.split("->")
        x, own = inputs.split(",")
        return tuple(i for i, letter in enumerate(own) if letter in result and letter not in x) or (-1,)
    return (-1,)


def _macs(module, x, y, kernel, equation) -> Any:
    """Multiply-accumulates of one call, an integer, or an expression where the batch is symbolic."""
    if isinstance(module, nn.ConvTranspose):
        return math.prod(x.shape[:-1]) * kernel.size
    if isinstance(module, nn.ConvLocal):
        return y.size * kernel.shape[-2]
    if isinstance(module, nn.DenseGeneral):
        axes = np.ravel(module.axis)
        return y.size * math.prod(x.shape[int(axis)] for axis in axes)
    if isinstance(module, nn.Einsum):
        inputs, result = equation.split("->")
        summed = [i for i, letter in enumerate(inputs.split(",")[1]) if letter not in result]
        return y.size * math.prod(kernel.shape[i] for i in summed)
    return y.size * kernel.size // kernel.shape[-1]


def bits_of_layer(bits: Bits, index: int) -> Bits:
    """Scalars of the quantized layer of that index."""
    return Bits(*(v if v is None or np.ndim(v) == 0 else jnp.asarray(v)[index] for v in bits))


def place_of(path: str) -> tuple[str, ...]:
    """A path as the keys of a tree."""
    return tuple(filter(None, path.split("/")))
