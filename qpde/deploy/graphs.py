"""Graph networks for deployment: kernels of the hidden layers as integer codes, the rest in float32.

Node features meet a kernel first and the graph's weights 1 / sqrt(d) then, so most of a graph network's arithmetic is
real. What few bits save is the file: codes times their scale are the rounded kernels, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qpde import quantizers
from qpde.bits import Bits
from qpde.checks import check_variables
from qpde.deploy.packing import PACKED_BITS
from qpde.deploy.program import Kernel
from qpde.models.graphs import layers
from qpde.models.graphs.networks import GraphNetwork

__all__ = ["FoldedGraph", "fold_graph"]

_LAYERS = {
    kind.__name__: kind
    for kind in (layers.PDELayer, layers.ConvolutionLayer, layers.InitialResidualLayer, layers.AttentionLayer)
}
_NESTED = {"smoothing": layers.GraphSmoothing}


@dataclasses.dataclass(frozen=True)
class FoldedGraph:
    """A graph network whose kernels are codes.

    Attributes:
      layer: Name of the hidden layers' kind.
      options: Their fields, plain values.
      depth, num_classes: Of the network.
      act_bits: Bit-width of activations, one for all or one for each layer; None is exact.
      kernels: Codes of the hidden layers' kernels by name, (depth, 1, width, width).
      scales: Scales of the codes, (depth,) or (depth, width).
      params: All other parameters by their path, float32.
    """

    layer: str
    options: dict[str, Any]
    depth: int
    num_classes: int
    act_bits: int | tuple[int, ...] | None
    kernels: dict[str, Kernel]
    scales: dict[str, np.ndarray]
    params: dict[str, np.ndarray]

    def check(self) -> None:
        """Raise a ValueError where the parts do not fit together."""
        if self.layer not in _LAYERS:
            raise ValueError(f"unknown layer {self.layer!r}")
        if set(self.kernels) != set(self.scales):
            raise ValueError("kernels and scales have other names")

    @property
    def model(self) -> GraphNetwork:
        """The network, whose weights are exact: they are rounded already."""
        options: dict[str, Any] = {
            k: _NESTED[k](**v) if k in _NESTED and v is not None else v for k, v in self.options.items()
        }
        return GraphNetwork(
            layer=_LAYERS[self.layer](**options),
            depth=self.depth,
            num_classes=self.num_classes,
            dropout=0.0,
            weight_bits=None,
            act_bits=None,
            loop="auto",
            remat=False,
        )

    def variables(self, values: dict[str, Any] | None = None) -> dict:
        """The network's collections, kernels multiplied out.

        Args:
          values: Kernel codes by name, traced, in place of the network's own.
        """
        values = {k: kernel.values for k, kernel in self.kernels.items()} if values is None else values
        params: dict[str, Any] = {}
        for path, value in self.params.items():
            *folders, name = path.split("/")
            place = params
            for folder in folders:
                place = place.setdefault(folder, {})
            place[name] = jnp.asarray(value)
        for name, codes in values.items():
            scale = jnp.asarray(self.scales[name]).reshape(self.depth, 1, -1)
            params["layers"][name] = jnp.asarray(codes)[:, 0].astype(jnp.float32) * scale
        return {"params": params}

    def __call__(self, graph: Any, values: dict[str, Any] | None = None) -> jax.Array:
        """Logits of all nodes of a graph."""
        act_bits = jnp.asarray(self.act_bits) if isinstance(self.act_bits, tuple) else self.act_bits
        model: Any = self.model
        return model.apply(self.variables(values), graph, bits=Bits(None, act_bits))


def fold_graph(model: GraphNetwork, variables: Mapping[str, Any], *, bits: Bits | None = None) -> FoldedGraph:
    """Fold a graph network at fixed bit-widths: kernels become codes, the rest stays what it is.

    Args:
      model: Graph network, as `qpde.models.create` makes it.
      variables: Its collections.
      bits: Bit-widths; that of the weights is a static number from 2 to 8, or None for float32 kernels. None takes the
        model's own.
    Returns:
      The network, whose logits are those of the fake-quantized one.
    Raises:
      ValueError: More than 8 bits of weights, a bit-width for each layer, or a level set without steps.
    """
    check_variables(variables, "variables")
    bits = model.bits if bits is None else bits
    if bits.weights is not None and (np.ndim(bits.weights) or not 2 <= int(bits.weights) <= 8):
        raise ValueError(f"weights of {bits.weights} bits have no code: give one number from 2 to 8, or None")
    if bits.weights is not None and model.layer.levels != "uniform":
        raise ValueError(f"levels={model.layer.levels!r} have no code here: use levels='uniform', or weight_bits=None")
    params = dict(unfreeze(dict(variables))["params"])
    layer = dict(params["layers"])
    kernels, scales = {}, {}
    clips = np.asarray(layer["weight_clips"]).reshape(model.depth, len(model.layer.kernel_names), -1)
    for i, name in enumerate(model.layer.kernel_names if bits.weights is not None else ()):
        values = layer.pop(name)
        clip = clips[:, i] if model.layer.per_channel else clips[:, i, 0]
        encoded = [quantizers.encode_weight(w, c, int(bits.weights)) for w, c in zip(values, clip, strict=True)]
        packed = next(b for b in PACKED_BITS if b >= int(bits.weights))
        kernels[name] = Kernel(np.stack([np.asarray(e.codes) for e in encoded])[:, None], packed)
        scales[name] = np.stack([np.asarray(e.scale) for e in encoded])
    params["layers"] = layer
    options = {f.name: getattr(model.layer, f.name) for f in dataclasses.fields(model.layer)}
    act_bits = bits.activations
    if act_bits is not None:
        act_bits = int(act_bits) if np.ndim(act_bits) == 0 else tuple(int(b) for b in np.asarray(act_bits))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return FoldedGraph(
        layer=type(model.layer).__name__,
        options={k: dataclasses.asdict(v) if k in _NESTED and v is not None else v for k, v in options.items()},
        depth=model.depth,
        num_classes=model.num_classes,
        act_bits=act_bits,
        kernels=kernels,
        scales=scales,
        params={"/".join(k.key for k in path): np.asarray(leaf, np.float32) for path, leaf in leaves},
    )
