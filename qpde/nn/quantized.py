"""Quantizers for a Linen module that stays as it is.

`quantized` wraps a module. While it runs, every call of a layer with a kernel is intercepted: its input and its kernel
are rounded as the first matching rule says. Clips are parameters beside the kernel, so the module's own checkpoints
fit: `QuantizedModule.adopt` adds the clips that they lack. The result follows `qpde.models.QuantizedNetwork`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import scope as flax_scope
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from qpde.batches import Batch, read_batch, read_batches
from qpde.bits import EXACT_BITS, LARGEST_BITS, Bits
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.images.cost import Row, Summary
from qpde.models.images.network import Network
from qpde.models.layers import Observe
from qpde.nn.chain import BoundLink, Chain, links_of
from qpde.nn.convolutions import conv_general_dilated
from qpde.nn.kernels import Layer, StoredKernel, stored_kernels
from qpde.nn.layers import QuantLayer, SymmetricStep, kernel_macs
from qpde.nn.modes import training_arguments
from qpde.nn.rounding import rounded_input, rounded_kernel
from qpde.nn.rules import LayerQuantizers, Rule, check_rules, first_match

__all__ = ["LAYERS", "Layer", "QuantizedModule", "quantized"]

LAYERS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
"""Layers that a rule can quantize, and what is derived from them."""

STATES = "states"


def quantized(model: nn.Module, rules: Sequence[Rule] = ()) -> QuantizedModule:
    """Put quantizers into a Linen module, which stays as it is.

    The first rule that matches a layer's path decides. Layers that no rule matches stay exact, and so does everything
    that is no layer with a kernel: norms, embeddings, attention weights. Layers of `qpde.nn` keep their own settings.

    Args:
      model: Any Linen module that takes one array (others may follow it).
      rules: What is rounded and how, see `Rule`.
    Returns:
      A module with the same parameters and clips beside the kernels. With `bits=qpde.Bits()` it is the model itself.
    Raises:
      ValueError: not a Linen module, one of our networks, which have quantizers already, or not rules. A rule that
        decides nothing is found when the network is made or called.

    >>> model = quantized(nn.Dense(2), [Rule("", weights=4, activations=4)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> sorted(variables["params"])
    ['act_clips', 'bias', 'kernel', 'weight_clips']
    """
    if isinstance(model, Network | GraphNetwork | QuantizedModule):
        raise ValueError(f"{type(model).__name__} has quantizers already: choose its bits by `with_bits`")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no flax.linen.Module; an nnx module is quantized in its Linen form, see "
            "flax.nnx.bridge.ToLinen"
        )
    if wrong := [rule for rule in rules if not isinstance(rule, Rule)]:
        raise ValueError(f"rules must be qpde.Rule; got {wrong[0]!r}")
    return QuantizedModule(model, tuple(rules))


class QuantizedModule(nn.Module):
    """A Linen module with quantizers; make one by `qpde.quantized`.

    Attributes:
      module: The module, which stays as it is.
      rules: What is rounded, and how.
      own_bits: Bits where a call gives none. None: those of the rules.
      signs: (path, whether its input can be negative) of layers with signed="auto", as `with_signs` found them.
    """

    module: nn.Module
    rules: tuple[Rule, ...]
    own_bits: Bits | None = None
    signs: tuple[tuple[str, bool], ...] = ()

    def setup(self):
        nn.share_scope(self, self.module)
        _follow_scope(self.module)

    def __hash__(self):
        # Without the module, whose fields may be lists: networks are static arguments of compiled functions.
        return hash((type(self.module), self.rules, self.own_bits, self.signs))

    def __call__(
        self,
        *args: Any,
        bits: Bits | None = None,
        return_states: bool = False,
        train: bool | None = None,
        observe: Observe | None = None,
        momentum: float | None = None,
        power_iterations: int = 1,
        listen: Callable[[dict[str, Layer]], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Output of the module with rounded layers.

        Args:
          *args: Passed on to the module.
          bits: `qpde.Bits` of this call, scalars or one value for each quantized layer in the order of their first
            calls, traced or not. `Bits()` is the module itself. None: the network's own.
          return_states: Also return the outputs of the quantized layers, in order. A layer inside `nn.scan` gives one
            for each iteration.
          train: Passed on as the module calls it: train, training, deterministic, use_running_average. None: not.
          observe: Sees what every quantizer rounds, see `qpde.models.layers.Observe`; its records go to the collection
            "observed", in place of the clips.
          momentum: Share of the running statistics that is kept by every `nn.BatchNorm`, which then normalises by the
            batch. Dropout without random numbers is off in such a call.
          power_iterations: Iterations of every spectral norm of a `SymmetricStep`.
          listen: Called at the end with the layers by path, while the function is traced.
          **kwargs: Passed on to the module.
        Raises:
          ValueError: a rule that decides nothing, bits of another number than layers, clips that are missing, or
            another collection than "params" that an `nn.scan` around a layer does not carry.
        """
        bits = self.own_bits if bits is None else bits
        call = _Call(self, bits, observe, return_states, momentum, power_iterations)
        with nn.intercept_methods(call.intercept):
            output = self.module(*args, **self._training(train, kwargs), **kwargs)
        call.finish(output)
        if listen is not None:
            listen(call.layers)
        return (output, call.states()) if return_states else output

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; the states travel through transforms such as `nn.remat` in a collection."""
        if not kwargs.get("return_states"):
            return super().apply(variables, *args, mutable=mutable, **kwargs)
        filters = flax_scope.union_filters(mutable, STATES)
        output, updates = super().apply(variables, *args, mutable=filters, **kwargs)
        return output if mutable is False else (output, {k: v for k, v in updates.items() if k != STATES})

    @property
    def bits(self) -> Bits | None:
        """Bits where a call gives none, or None where they differ from layer to layer, see `layer_bits`."""
        if self.own_bits is not None:
            return self.own_bits
        found = {Bits(rule.weights, rule.activations) for rule in self.rules if not rule.leave_alone}
        return found.pop() if len(found) == 1 else None

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """None but those of clips and shares, see `qpde.project`."""
        return {}

    @nn.nowrap
    def with_bits(self, bits: Bits) -> QuantizedModule:
        """This network with other bits of its own, for all layers that are not left alone."""
        return self.clone(own_bits=bits)

    @nn.nowrap
    def with_quantizers(self, bits: Bits, *, per_channel: bool = False) -> QuantizedModule:
        """This network with these bits, whose kernels are rounded as they are.

        Args:
          bits: Whole numbers or None.
          per_channel: A clip for each output channel of every kernel.
        """
        rules = (dataclasses.replace(rule, standardize=False, per_channel=per_channel) for rule in self.rules)
        return self.clone(rules=tuple(rules), own_bits=bits)

    @nn.nowrap
    def with_signs(self, variables: Any, batches: Iterable[Batch]) -> QuantizedModule:
        """This network, knowing which layers of signed="auto" have inputs below 0 on the data.

        Args:
          variables: Its collections, or the module's own.
          batches: Inputs, or pairs of inputs and labels, which are not used.
        Raises:
          ValueError: no batches, or one of another form.
        """
        signs: dict[str, bool] = {}
        empty = True
        for x, _ in read_batches(batches, variables):
            empty, observed = False, jax.device_get(_negative(self, variables, x))
            layers = [layer for layer in self.layers(variables, x).values() if layer.settings is not None]
            for layer, records in zip(layers, self.activation_records(observed, variables, x), strict=True):
                if layer.settings is not None and layer.settings.signed == "auto":
                    negative = any(bool(np.any(record)) for record in records)
                    signs[layer.path] = signs.get(layer.path, False) or negative
        if empty:
            raise ValueError("`batches` is empty: the signs of inputs are read off data")
        return self.clone(signs=tuple(sorted(signs.items())))

    @nn.nowrap
    def adopt(self, variables: Any, x: Any) -> dict:
        """The module's own variables with all parameters of this network: missing ones get their starting values.

        Args:
          variables: Variables of the module, for instance from a checkpoint, or of this network.
          x: An input, or a pair of inputs and labels.
        """
        return _adopted(self, unfreeze(variables), read_batch(x, variables))

    @nn.nowrap
    def layers(self, variables: Any, x: Any) -> dict[str, Layer]:
        """All layers with a kernel by path, in the order of their first calls; nothing is computed.

        Args:
          variables: The network's collections, or the module's own; None: what `init` would make.
          x: An input, or its shape and dtype.
        """
        return self._traced(variables, x)[0]

    @nn.nowrap
    def block_names(self, variables: Any, x: Any) -> list[str]:
        """Paths of the quantized layers, in the order of their states and of bits that are given one by one."""
        return [path for path, layer in self.layers(variables, x).items() if layer.settings is not None]

    @nn.nowrap
    def layer_bits(self, variables: Any, x: Any) -> Bits:
        """The network's own bits, one value for each quantized layer; None is 32, which rounds nothing."""
        settings = [layer.settings for layer in self.layers(variables, x).values() if layer.settings is not None]
        rows = [_own_bits(self, own) for own in settings]
        return Bits(*(jnp.array([LARGEST_BITS if v is None else v for v in part]) for part in zip(*rows, strict=True)))

    @nn.nowrap
    def output_bias(self, variables: Any, x: Any) -> tuple[str, ...] | None:
        """Place in "params" of the bias that is added to the network's output last, or None."""
        layers, params = self._traced(variables, x)
        place = None if layers.output is None else (*_place(layers.output), "bias")
        return place if place in flatten_dict(params) else None

    @nn.nowrap
    def description(self) -> dict[str, Any]:
        """What `qpde.save` keeps of it beside the variables, values of JSON: all but the module and its rules."""
        bits = None if self.own_bits is None else list(self.own_bits)
        return {"module": type(self.module).__name__, "bits": bits, "signs": [list(sign) for sign in self.signs]}

    @nn.nowrap
    def described(self, description: Mapping[str, Any]) -> QuantizedModule:
        """This network with the bits and signs of a description.

        Args:
          description: As `description` returned it, for the same module.
        Raises:
          ValueError: It is of another module.
        """
        name = type(self.module).__name__
        if description["module"] != name:
            raise ValueError(f"they are weights of a {description['module']}, not of a {name}")
        bits = description["bits"]
        signs = tuple((str(path), bool(sign)) for path, sign in description["signs"])
        return self.clone(own_bits=None if bits is None else Bits(*bits), signs=signs)

    @nn.nowrap
    def stored_kernels(self, variables: Any, x: Any, bits: Bits | None = None) -> dict[str, StoredKernel]:
        """The kernels as they are rounded, by their paths in "params"; those that no call rounds are left out.

        Args:
          variables: The network's collections.
          x: An input, or its shape and dtype.
          bits: Whole numbers, scalars or one value for each quantized layer. None: the network's own.
        """
        params = unfreeze(variables)["params"]
        bits = self.layer_bits(variables, x) if bits is None else bits
        layers = [layer for layer in self.layers(variables, x).values() if layer.settings is not None]
        found: dict[str, StoredKernel] = {}
        for index, layer in enumerate(layers):
            width = bits_of_layer(bits, index).weights
            if width is not None and int(width) < EXACT_BITS:
                found |= stored_kernels(layer, params, int(width))
        return found

    @nn.nowrap
    def links(self, variables: Any, x: Any, bits: Bits) -> list[BoundLink]:
        """The parts of a network made of a `qpde.nn.Chain`, with what `qpde.certify` needs to know of them.

        Args:
          variables: The network's collections.
          x: Inputs, of which only shape and dtype count.
          bits: Scalars, or one value for each quantized layer.
        Raises:
          ValueError: Something else than a chain, or a part of which no constant is proven.
        """
        if not isinstance(self.module, Chain):
            raise ValueError(
                f"a certificate needs a proven Lipschitz constant of all that a network does, and "
                f"{type(self.module).__name__} may do anything between its layers: write it as "
                "qpde.nn.Chain((layer, layer, ...)), whose parts have known constants"
            )
        variables = unfreeze(variables)
        layers: dict[str, tuple[LayerQuantizers, bool, Bits]] = {}
        for layer in self.layers(variables, x).values():
            if (settings := layer.settings) is not None:
                signed = dict(self.signs).get(layer.path, True) if settings.signed == "auto" else settings.signed
                layers[layer.path] = (settings, bool(signed), bits_of_layer(bits, len(layers)))
        for field, value in zip(Bits._fields, bits, strict=True):
            if np.ndim(value) > 0 and np.shape(value) != (len(layers),):
                raise ValueError(
                    f"bits.{field} has shape {np.shape(value)}; give one value, or one for each of the {len(layers)} "
                    "quantized layers"
                )
        return links_of(self.module, variables, x, layers)

    @nn.nowrap
    def activation_records(self, observed: dict, variables: Any, x: Any) -> list[list[Any]]:
        """Records of an `observe` for every quantized layer's activations, in order; inside scans they are stacked."""
        found = flatten_dict(unfreeze(observed), is_leaf=lambda _, node: not isinstance(node, Mapping))
        blocks = []
        for place in map(_place, self.block_names(variables, x)):
            own = [p for p in found if p[: len(place)] == place and p[-1].endswith("clips") and p[-1].startswith("act")]
            records = [found[p] for p in sorted(own, key=lambda p: (len(p[-1]), p))]
            blocks.append([r for one in records for r in (one if isinstance(one, list | tuple) else [one])])
        return blocks

    @nn.nowrap
    def summary(self, input_shape: tuple[int, ...], *, bits: Bits | None = None) -> Summary:
        """Parameters, bits, multiply-accumulates and bit-operations of every layer with a kernel, for one input.

        Args:
          input_shape: Shape of one input without its batch axis.
          bits: Scalars or one value for each quantized layer. None: the network's own.
        """
        layers, params = self._traced(None, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
        return _summary(self, layers, params, self.own_bits if bits is None else bits)

    @nn.nowrap
    def _traced(self, variables: Any, x: Any) -> tuple[_Layers, dict]:
        """Layers of one call, and the shapes of its parameters."""
        found: list[Any] = []
        options: dict[str, Any] = {"train": False, "bits": Bits(), "listen": found.append}
        if variables is None:
            variables = jax.eval_shape(lambda x: self.init(jax.random.key(0), x, **options), x)
        else:
            jax.eval_shape(lambda variables, x: self.apply(variables, x, **options), variables, x)
        return found[-1], unfreeze(variables.get("params", {}))

    def _training(self, train: bool | None, given: dict) -> dict[str, bool]:
        """`train` by the names that the module's call has for it."""
        if train is None:
            return {}
        return training_arguments(self.module, train, given=given)


class _Layers(dict):
    """Layers by path, and the path of the one whose output is the network's, or None."""

    output: str | None = None


class _Call:
    """One call of a quantized module: what its layers need to know, and what is known of them afterwards."""

    def __init__(self, model, bits, observe, return_states, momentum, power_iterations):
        self.model, self.bits, self.observe = model, bits, observe
        self.return_states, self.momentum, self.power_iterations = return_states, momentum, power_iterations
        self.observed = observe is not None and model.is_mutable_collection("observed")
        self.root = len(model.path)
        self.signs = dict(model.signs)
        self.layers = _Layers()
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
                state = found[(*_place(path), name)]
                states += [state] if state.shape == shape else list(state.reshape(-1, *shape))
        return tuple(states)


def _follow_scope(module: nn.Module) -> None:
    """Move paths along where submodules were there before their parent's scope was shared, as in `nn.Sequential`."""
    for child in module._state.children.values():
        if isinstance(child, nn.Module) and child.scope is not None and module.scope is not None:
            child.scope.path = (*module.scope.path, str(child.scope.name))
            _follow_scope(child)


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


def _own_bits(model: QuantizedModule, settings: LayerQuantizers) -> Bits:
    return Bits(settings.weights, settings.activations) if model.own_bits is None else model.own_bits


@partial(jax.jit, static_argnames="model")
def _adopted(model, variables, x):
    # Everything may be made, but only parameters are kept that were missing.
    _, updates = model.apply(variables, x, train=False, bits=Bits(), mutable=["params"])
    return {**variables, **updates}


@partial(jax.jit, static_argnames="model")
def _negative(model, variables, x):
    def observe(x, clip, quantizer):
        return (None if quantizer.is_weight else jnp.min(x) < 0), clip

    return model.apply(variables, x, train=False, bits=Bits(), observe=observe, mutable=["observed"])[1]["observed"]


def _place(path: str) -> tuple[str, ...]:
    """A path as the keys of a tree."""
    return tuple(filter(None, path.split("/")))


def _summary(model, layers, params, bits) -> Summary:
    sizes = {place: math.prod(leaf.shape) for place, leaf in flatten_dict(params).items()}
    sizes = {p: n for p, n in sizes.items() if not p[-1].endswith("clips")}
    rows, index = [], 0
    for path, layer in layers.items():
        place = _place(path)
        own = {p: sizes.pop(p) for p in list(sizes) if p[: len(place)] == place}
        kernels = sum(n for p, n in own.items() if "kernel" in p[-1])
        # Inside nn.scan a layer has as many kernels as iterations.
        times = 1 if layer.kernel_shape is None else max(1, kernels // math.prod(layer.kernel_shape))
        own_bits = Bits()
        if layer.settings is not None:
            own_bits = bits_of_layer(_own_bits(model, layer.settings) if bits is None else bits, index)
            index += 1
        weights, activations = (LARGEST_BITS if v is None else int(v) for v in own_bits)
        macs, parameters = times * layer.macs, sum(own.values())
        rows.append(
            Row(
                path,
                layer.output_shape[1:],
                parameters,
                weights,
                activations,
                macs,
                macs * weights * activations,
                -(-kernels * weights // 8) + 4 * (parameters - kernels),
            )
        )
    if rest := sum(sizes.values()):
        rows.append(Row("other parameters", (), rest, LARGEST_BITS, LARGEST_BITS, 0, 0, 4 * rest))
    return Summary(tuple(rows))
