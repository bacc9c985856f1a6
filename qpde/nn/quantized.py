"""Quantizers for a Linen module that stays as it is.

`quantized` wraps a module. While it runs, every call of a layer with a kernel is intercepted: its input and its kernel
are rounded as the first matching rule says. Clips are parameters beside the kernel, so the module's own checkpoints
fit: `QuantizedModule.adopt` adds the clips that they lack. The result follows `qpde.models.QuantizedNetwork`.
"""

from __future__ import annotations

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
from qpde.nn.call import STATES, Call, Layers, bits_of_layer, place_of
from qpde.nn.chain import BoundLink, Chain, links_of
from qpde.nn.kernels import Layer, StoredKernel, stored_kernels
from qpde.nn.modes import training_arguments
from qpde.nn.rules import LayerQuantizers, Rule

__all__ = ["Layer", "QuantizedModule", "quantized"]


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
        call = Call(self, bits, observe, return_states, momentum, power_iterations)
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
        place = None if layers.output is None else (*place_of(layers.output), "bias")
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
        for place in map(place_of, self.block_names(variables, x)):
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
    def _traced(self, variables: Any, x: Any) -> tuple[Layers, dict]:
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


def _follow_scope(module: nn.Module) -> None:
    """Move paths along where submodules were there before their parent's scope was shared, as in `nn.Sequential`."""
    for child in module._state.children.values():
        if isinstance(child, nn.Module) and child.scope is not None and module.scope is not None:
            child.scope.path = (*module.scope.path, str(child.scope.name))
            _follow_scope(child)


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


def _summary(model, layers, params, bits) -> Summary:
    sizes = {place: math.prod(leaf.shape) for place, leaf in flatten_dict(params).items()}
    sizes = {p: n for p, n in sizes.items() if not p[-1].endswith("clips")}
    rows, index = [], 0
    for path, layer in layers.items():
        place = place_of(path)
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
