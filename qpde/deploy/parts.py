"""Parts of a network with their numbers: codes of kernels and their scales, units of activations, scales of norms."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from qpde import quantizers
from qpde.bits import EXACT_BITS, Bits
from qpde.deploy.program import Kernel
from qpde.models.images.block import Block
from qpde.models.images.network import BoundPart
from qpde.models.images.parts import ExactConv
from qpde.models.layers import NORM_EPSILON, depthwise_bits, is_depthwise
from qpde.quantizers.levels import LEVEL_SETS

__all__ = ["Outer", "Part", "table_of", "top_code"]

_CODE_BITS = 8
_PACKED_BITS = (2, 3, 4, 8)
_LARGEST_TABLE = 2**15  # of levels that are written as whole multiples


@dataclasses.dataclass(frozen=True)
class Part:
    """One block with its numbers, and the scales of its codes."""

    name: str
    block: Block
    variables: dict
    device_variables: dict
    step_size: float
    gamma2: Any
    bits: Bits

    @property
    def params(self) -> dict:
        """Parameters of the block."""
        return self.variables["params"]

    def clips(self) -> dict[str, list[np.ndarray]]:
        """`weight_clips` and `act_clips` at the bits of the block."""
        return jax.tree.map(np.asarray, self.block.clip_lists(self.device_variables["params"], self.bits))

    def signed(self, index: int) -> bool:
        """Whether an activation has negative codes."""
        return index == 0 and self.block.signed_inputs

    def unit(self, index: int) -> float:
        """The real number that one code of an activation stands for; 1 where nothing is rounded."""
        bits, clip = self.bits.activations, float(self.clips()["act_clips"][index])
        if bits is None or bits >= EXACT_BITS:
            return 1.0
        if self.block.levels != "uniform":
            return clip / float(table_of(self.block.levels, bits - self.signed(index))[-1])
        return clip / top_code(bits, self.signed(index))

    def kernel(self, name: str) -> tuple[Kernel, np.ndarray | np.floating]:
        """The kernel and its scale, () or (C_out,)."""
        index = list(self.block.kernel_shapes()).index(name)
        w, clip = self.params[name], self.clips()["weight_clips"][index]
        bits, depthwise = self.bits.weights, is_depthwise(w.shape)
        if bits is not None and depthwise:
            bits = depthwise_bits(bits)
        if bits is not None and self.block.standardize:
            w = np.asarray(quantizers.standardize_weight(w))
        codes, scale, packed = weight_codes(w, clip, bits, self.block.levels)
        return Kernel(codes, packed, depthwise and w.shape[3] > 1), scale

    def norm(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """g and b of a batch norm in evaluation, g x + b, in float64."""
        return norm_of(self.params[name], self.variables["batch_stats"][name])

    def tied(self) -> tuple[np.ndarray, np.ndarray, float]:
        """D, the shift of D K x, and h of a tied or spectral step."""
        _, scales, step_size = self.block.factors(self.device_variables, self.step_size, self.bits)
        scale = np.asarray(scales["norm1"], np.float64)
        mean = np.asarray(self.variables["batch_stats"]["norm1"]["mean"], np.float64)
        return scale, self.params["norm1"]["bias"] - mean * scale, float(step_size)


class Outer:
    """Stem, neck or head: its kernel, float32 or of 8 bits with a scale for each channel, and its parameters."""

    def __init__(self, bound: BoundPart, bits: int | None):
        self.part, self.bits = bound.part, bits
        self.stride = bound.part.stride if isinstance(bound.part, ExactConv) else 1
        self.params, self.stats = (jax.tree.map(np.asarray, bound.variables[k]) for k in ("params", "batch_stats"))
        w = self.params["kernel"]
        w = w.astype(np.float32).reshape((1,) * (4 - w.ndim) + w.shape)
        self.kernel, self.scale = Kernel(w, None), np.float64(1)
        if bits is not None:
            self.scale = np.maximum(np.abs(w).max((0, 1, 2)).astype(np.float64), 1e-30) / top_code(bits, signed=True)
            self.kernel = Kernel(np.round(w / self.scale).astype(np.int8), bits)

    def norm(self) -> tuple[np.ndarray, np.ndarray]:
        """g and b of its batch norm."""
        return norm_of(self.params["norm"], self.stats["norm"])

    @property
    def reasons(self) -> list[str]:
        """Why it is computed in float32."""
        return ["float32 kernel" if self.bits is None else "float32 input"]


def norm_of(params: dict, stats: dict) -> tuple[np.ndarray, np.ndarray]:
    """g and b of a batch norm in evaluation, g x + b, in float64."""
    scale = params["scale"].astype(np.float64) / np.sqrt(stats["var"].astype(np.float64) + NORM_EPSILON)
    return scale, params["bias"] - stats["mean"] * scale


def top_code(bits: int, signed: bool) -> int:
    """The largest code of evenly spaced levels."""
    return 2 ** (bits - int(signed)) - 1


def table_of(levels: str, bits: int) -> np.ndarray:
    """The levels of a magnitude of some bits, ascending: whole multiples where they are small, else within [0, 1]."""
    # Every level is a fixed point of the rounding, and none lies closer to 0 than the powers of two below.
    level_set = LEVEL_SETS[levels]
    powers = 2.0 ** -np.arange(0, 126, dtype=np.float32)
    fine: Any = np.concatenate([np.linspace(0, 1, 4097, dtype=np.float32), powers])
    table = np.unique(np.asarray(level_set.snap(fine, bits)))
    if levels == "uniform":
        return table
    whole = table / table[table > 0].min()
    if levels == "apot":
        units = next((u for u in range(1, 4097) if np.allclose(table * u, np.round(table * u), atol=1e-4)), None)
        whole = table if units is None else np.round(table * units)
    is_short = whole[-1] <= _LARGEST_TABLE and np.all(whole == np.round(whole))
    return (whole if is_short else table).astype(np.float32)


def weight_codes(w: np.ndarray, clip: np.ndarray, bits: int | None, levels: str):
    """Codes (int8, or float32 where they have none), their scale, and the bits to pack them at or None."""
    if bits is not None and bits <= _CODE_BITS and levels == "uniform":
        codes, scale = quantizers.encode_weight(w, clip, bits)
        return np.asarray(codes), np.asarray(scale, np.float64), next(b for b in _PACKED_BITS if b >= bits)
    rounded = np.asarray(quantizers.quantize_weight(w, clip, bits, levels=levels), np.float32)
    if bits is None or bits > _CODE_BITS:
        return rounded, np.float64(1), None
    table = table_of(levels, bits - 1)
    top = float(table[-1])
    if np.any(table != np.round(table)) or top > 127:
        return rounded, np.float64(1), None
    packed = next(b for b in _PACKED_BITS if 2 ** (b - 1) > top)
    return np.round(rounded.astype(np.float64) / clip * top).astype(np.int8), clip.astype(np.float64) / top, packed
