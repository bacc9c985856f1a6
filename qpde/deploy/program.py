"""The instructions of a folded network, and what is known of its values without data.

A folded network is a list of operations on named values. The first reads "images", the last one writes "logits". Maps
are (N, H, W, C), and every number is float32, but a value can be known to be whole: codes of a quantizer, and sums of
codes times kernel codes. Sums of whole numbers are the same in any order while they stay below 2^24.

    Conv        sums of x with a kernel, or with its adjoint K^T
    Affine      ((f_1 x_1 + f_2 x_2) + ...) + bias, per channel, rounded to float32 after each operation
    Quantize    round half to even, then clip to [low, high]
    Snap        nearest of a table of levels, for level sets that are not uniform
    Clip        clip to [low, high] without rounding
    Smooth      explicit steps of total-variation smoothing
    Pool        2x2 means
    Concat      channels of x, then the first channels of another value
    Resize      bilinear interpolation to the height and width of another value
    Mean        mean over all pixels, (N, 1, 1, C)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from qpde.bits import EXACT_LIMIT

__all__ = [
    "EXACT_LIMIT",
    "Affine",
    "Clip",
    "Concat",
    "Conv",
    "Kernel",
    "Mean",
    "Op",
    "Pool",
    "Program",
    "Quantize",
    "Resize",
    "Smooth",
    "Snap",
    "accumulator_bound",
    "consumers",
    "whole_bounds",
]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Weights of a convolution, stored once however often they are used.

    Attributes:
      values: HWIO array (kh, kw, I, O), I = 1 where the kernel is depthwise. int8 codes, or float32.
      bits: Width that the codes are packed at: 2, 3, 4 or 8. None for float32.
      depthwise: Whether every channel has a kernel of its own.
    """

    values: np.ndarray
    bits: int | None
    depthwise: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the values are codes."""
        return self.bits is not None

    def adjoint(self) -> np.ndarray:
        """Values of the kernel whose convolution is K^T: flipped, and its channels swapped."""
        flipped = self.values[::-1, ::-1]
        return np.ascontiguousarray(flipped if self.depthwise else flipped.swapaxes(2, 3))


@dataclasses.dataclass(frozen=True)
class Conv:
    """Sums of x with a kernel; `padding` zeros on every side, `dilation` the distance of the taps."""

    out: str
    x: str
    kernel: str
    stride: int = 1
    padding: int = 0
    adjoint: bool = False
    dilation: int = 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Values that the operation reads."""
        return (self.x,)


@dataclasses.dataclass(frozen=True)
class Affine:
    """Sum of factors times values, then a bias; factors and bias are float32, () or (C,)."""

    out: str
    inputs: tuple[str, ...]
    factors: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None

    @property
    def shift(self) -> np.ndarray:
        """The bias, 0 where there is none."""
        return np.zeros((), np.float32) if self.bias is None else self.bias


@dataclasses.dataclass(frozen=True)
class _Unary:
    out: str
    x: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Values that the operation reads."""
        return (self.x,)


@dataclasses.dataclass(frozen=True)
class Quantize(_Unary):
    """Round half to even, then clip to the whole numbers [low, high]."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Snap(_Unary):
    """Nearest number of `table`, with the sign of x if signed; ties go to the smaller one.

    Attributes:
      table: Ascending float32 numbers, the first one 0.
      signed: Whether negative numbers are rounded to minus the table; otherwise they become 0.
    """

    table: np.ndarray
    signed: bool = False

    @property
    def middles(self) -> np.ndarray:
        """What a magnitude has to exceed for each next level."""
        return ((self.table[1:].astype(np.float64) + self.table[:-1]) / 2).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Clip(_Unary):
    """Clip to [low, high]; ReLU is [0, inf]."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Smooth(_Unary):
    """Explicit smoothing steps with Neumann borders, see `qpde.stencils.smooth`; in the units of x."""

    kind: str
    steps: int
    gamma2: float
    eps: float


@dataclasses.dataclass(frozen=True)
class Pool(_Unary):
    """2x2 means at stride 2; an odd last row or column is left out."""


@dataclasses.dataclass(frozen=True)
class Concat(_Unary):
    """Channels of x, then the first `channels` channels of y."""

    y: str
    channels: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """Values that the operation reads."""
        return (self.x, self.y)


@dataclasses.dataclass(frozen=True)
class Resize(_Unary):
    """Bilinear interpolation to the height and width of `like`, which are not smaller; corners of pixels coincide."""

    like: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Values that the operation reads."""
        return (self.x, self.like)


@dataclasses.dataclass(frozen=True)
class Mean(_Unary):
    """Mean over all pixels, which stays a map of one pixel."""


Op = Conv | Affine | Quantize | Snap | Clip | Smooth | Pool | Concat | Resize | Mean


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in order, and the kernels that they name."""

    ops: tuple[Op, ...]
    kernels: dict[str, Kernel]


def consumers(ops: Iterable[Op]) -> dict[str, list[Op]]:
    """The operations that read each value."""
    found: dict[str, list[Op]] = {}
    for op in ops:
        for name in op.inputs:
            found.setdefault(name, []).append(op)
    return found


def whole_bounds(program: Program) -> dict[str, tuple[int, int]]:
    """Find (lowest, highest) of every value that is whole whatever the images, before any rounding to float32.

    Args:
      program: Folded network.
    """
    bounds: dict[str, tuple[int, int]] = {}
    for op in program.ops:
        if isinstance(op, Quantize):
            bounds[op.out] = (op.low, op.high)
        elif isinstance(op, Snap) and np.all(op.table == np.round(op.table)):
            top = int(op.table[-1])
            bounds[op.out] = (-top if op.signed else 0, top)
        elif isinstance(op, Conv) and op.x in bounds and program.kernels[op.kernel].is_whole:
            bounds[op.out] = _conv_bounds(program.kernels[op.kernel], op.adjoint, bounds[op.x])
        elif isinstance(op, Affine) and op.bias is None and _is_whole_sum(op, bounds):
            bounds[op.out] = _sum_bounds(op, bounds)
    return bounds


def _is_whole_sum(op, bounds):
    return all(x in bounds for x in op.inputs) and all(np.all(f == np.round(f)) for f in op.factors)


def _conv_bounds(kernel, adjoint, bounds):
    values = (kernel.adjoint() if adjoint else kernel.values).astype(np.int64)
    values = values.reshape(-1, values.shape[-1])
    low, high = bounds
    terms = np.stack([values * low, values * high, np.zeros_like(values)])  # a padded pixel is 0
    return int(terms.min(0).sum(0).min()), int(terms.max(0).sum(0).max())


def _sum_bounds(op, bounds):
    low = high = np.zeros((), np.float64)
    for name, factor in zip(op.inputs, op.factors, strict=True):
        ends = [factor.astype(np.float64) * end for end in bounds[name]]
        low, high = low + np.minimum(*ends), high + np.maximum(*ends)
    return int(low.min()), int(high.max())


def accumulator_bound(program: Program) -> dict[str, int]:
    """The largest |sum| that every convolution of codes can reach, whatever the images.

    Below `EXACT_LIMIT` the sums are exact in float32 in any order, on any device. The range of the input's codes and
    the kernel's own codes decide, channel by channel.

    Args:
      program: A folded network.
    Returns:
      Bound by the name of the sum. Convolutions with a float32 input or kernel are left out.
    """
    bounds = whole_bounds(program)
    return {op.out: max(map(abs, bounds[op.out])) for op in program.ops if isinstance(op, Conv) and op.out in bounds}
