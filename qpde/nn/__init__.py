"""Layers for users' own Linen modules, quantizers for modules left as they are, and help for own training loops."""

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
from qpde.nn.quantized import Layer, QuantizedModule, quantized
from qpde.nn.rules import LayerQuantizers, Rule
from qpde.nn.training import optimizer_labels, project

__all__ = [
    "GradientStep",
    "Layer",
    "LayerQuantizers",
    "QuantActivation",
    "QuantConv",
    "QuantDense",
    "QuantDepthwise",
    "QuantLayer",
    "QuantizedModule",
    "Rule",
    "SymmetricStep",
    "TVSmoothing",
    "optimizer_labels",
    "project",
    "quantized",
]
