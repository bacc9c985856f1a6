"""Layers for users' own Linen modules, quantizers for modules left as they are, and help for own training loops."""

from qpde.nn.chain import Chain, Proven, flatten, global_mean
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
    "Chain",
    "GradientStep",
    "Layer",
    "LayerQuantizers",
    "Proven",
    "QuantActivation",
    "QuantConv",
    "QuantDense",
    "QuantDepthwise",
    "QuantLayer",
    "QuantizedModule",
    "Rule",
    "SymmetricStep",
    "TVSmoothing",
    "flatten",
    "global_mean",
    "optimizer_labels",
    "project",
    "quantized",
]
