"""Quantizers: `rounding` holds the formulas and gradients, `levels` the sets of levels, `clips` the starts of clips."""

from qpde.quantizers.clips import initial_clip
from qpde.quantizers.levels import LEVEL_SETS, Levels
from qpde.quantizers.rounding import (
    ACTIVATION_CLIP,
    LARGEST_LEVEL,
    WEIGHT_CLIP,
    Codes,
    dequantize,
    encode_activation,
    encode_weight,
    level_index,
    quantization_step,
    quantize_activation,
    quantize_weight,
    standardize_weight,
)

__all__ = [
    "ACTIVATION_CLIP",
    "LARGEST_LEVEL",
    "LEVEL_SETS",
    "WEIGHT_CLIP",
    "Codes",
    "Levels",
    "dequantize",
    "encode_activation",
    "encode_weight",
    "initial_clip",
    "level_index",
    "quantization_step",
    "quantize_activation",
    "quantize_weight",
    "standardize_weight",
]
