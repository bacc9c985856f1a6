"""What a trained network is, in words and numbers."""

import dataclasses
from typing import Any

from qpde.models import summary
from qpde.models.images.network import Network
from qpde.models.options import NetworkOptions
from qpde.trained import TrainedNetwork

__all__ = ["describe"]


def describe(network: TrainedNetwork) -> dict[str, Any]:
    """Tell what a trained network is.

    Args:
      network: Result of `qpde.load`.
    Returns:
      Values of JSON by what they are.
    """
    model = network.model
    found: dict[str, Any] = {"network": _name(model), "bits": _bits(model), "classes": list(network.classes)}
    if isinstance(model, Network):
        found["options"] = _options(model)
        if network.input_shape is not None:
            cost = summary(model, network.input_shape)
            packed = f"{cost.weight_bytes / 1024:.1f} KiB with weights packed at their bits"
            found |= {"parameters": cost.parameters, "size": packed, "bit-operations": cost.bit_operations}
        found["input"] = None if network.input_shape is None else "x".join(map(str, network.input_shape))
        found["pictures"] = f"the middle, {network.centre:.4g} of the short side, resized"
        for name in ("mean", "std"):
            values = getattr(network, name)
            found[name] = None if values is None else [round(float(value), 6) for value in values]
    return found | {"about": network.about}


def _name(model: Any) -> str:
    if isinstance(model, Network):
        return f"{model.architecture.name}, {len(model.blocks)} blocks"
    return f"{type(model.layer).__name__} on a graph, {model.depth} layers"


def _bits(model: Any) -> str:
    named = ("unquantized" if bits is None else f"{bits} bits" for bits in model.bits)
    weights, activations = named
    shared = getattr(model, "clip_bits", None)
    also = f"; trained for any of {', '.join(map(str, shared))} bits" if shared else ""
    return f"weights: {weights}, activations: {activations}{also}"


def _options(model: Network) -> dict[str, Any]:
    """The options that are not the default ones, without the bits."""
    defaults = {field.name: field.default for field in dataclasses.fields(NetworkOptions)}
    given = dataclasses.asdict(model.options)
    hidden = ("weight_bits", "act_bits", "clip_bits")
    return {name: value for name, value in given.items() if value != defaults[name] and name not in hidden}
