"""The list of operations that a network becomes, and what every block adds to it alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qpde.bits import EXACT_BITS
from qpde.deploy.folded import Note
from qpde.deploy.parts import Part, table_of, top_code
from qpde.deploy.program import Affine, Clip, Conv, Kernel, Op, Quantize, Smooth, Snap
from qpde.stencils import ENERGIES, max_stable_step

__all__ = ["Builder"]


class Builder:
    """Operations in the order in which they are added; every method returns the name of its result."""

    def __init__(self):
        self.ops: list[Op] = []
        self.kernels: dict[str, Kernel] = {}
        self.notes: list[Note] = []
        self.reasons: list[str] = []
        self.count = 0

    def note(self, part: str, weight_bits: int | None, act_bits: int | None) -> None:
        """End a part: note its bits, and the reasons given since the part before."""
        self.notes.append(Note(part, weight_bits, act_bits, tuple(dict.fromkeys(self.reasons))))
        self.reasons.clear()

    def in_float(self, reason: str) -> None:
        """Give a reason why something of the present part is computed in float32."""
        self.reasons.append(reason)

    def add(self, op: Callable[..., Op], *args: Any, name: str | None = None, **options: Any) -> str:
        """Any operation, its result named by a number where no name is given."""
        self.count += 1
        name = f"v{self.count}" if name is None else name
        self.ops.append(op(name, *args, **options))
        return name

    def affine(self, *terms: tuple[str, Any], bias: Any = None) -> str:
        """The sum of terms (x, factor) and a bias."""
        names, factors = zip(*terms, strict=True)
        factors = tuple(np.asarray(f, np.float32) for f in factors)
        return self.add(Affine, names, factors, None if bias is None else np.asarray(bias, np.float32))

    def relu(self, x: str) -> str:
        """max(x, 0)."""
        return self.add(Clip, x, 0.0, math.inf)

    def conv(self, part: Part, x: str, name: str, **options: Any) -> tuple[str, Any]:
        """Sums of a kernel of the block, "same" padding unless another is given, and the scale of its codes."""
        kernel, scale = part.kernel(name)
        return self.conv_of(f"{part.name}.{name}", kernel, x, **options), scale

    def conv_of(
        self,
        key: str,
        kernel: Kernel,
        x: str,
        *,
        stride: int = 1,
        padding: int | None = None,
        adjoint: bool = False,
        dilation: int = 1,
    ) -> str:
        """Sums of a kernel that is kept by its key."""
        self.kernels.setdefault(key, kernel)
        if not kernel.is_whole:
            self.in_float(f"{key.split('.')[-1]} has no integer codes")
        reach = dilation * (kernel.values.shape[0] - 1)
        padding = reach // 2 if padding is None else padding
        padding = reach - padding if adjoint else padding
        return self.add(Conv, x, key, stride, padding, adjoint, dilation)

    def quantize(self, part: Part, x: str, index: int) -> str:
        """Codes of an activation of the block, or what takes their place."""
        bits, signed = part.bits.activations, part.signed(index)
        if bits is None:
            self.in_float("activations are not rounded")
            return x
        if bits >= EXACT_BITS:
            self.in_float("activations are not rounded")
            clip = float(part.clips()["act_clips"][index])
            return self.add(Clip, x, -clip if signed else 0.0, clip)
        name = f"{part.name}.q{index}"
        if part.block.levels != "uniform":
            table = table_of(part.block.levels, bits - signed)
            if np.any(table != np.round(table)):
                self.in_float(f"{part.block.levels} levels of {bits} bits are no whole multiples")
            return self.add(Snap, x, table, signed, name=name)
        top = top_code(bits, signed)
        return self.add(Quantize, x, -top if signed else 0, top, name=name)

    def shortcut(self, part: Part, x: str, q: str) -> str:
        """Q(x), or clip(x) where the residual is precise."""
        if part.block.residual == "rounded" or part.bits.activations is None:
            return q
        self.in_float("the precise shortcut")
        top = float(part.clips()["act_clips"][0]) / part.unit(0)
        return self.add(Clip, x, -top if part.signed(0) else 0.0, top)

    def smooth(self, part: Part, x: str, unit: float) -> str:
        """Smoothing in units of one code: that of TV kinds scales gamma2 with eps."""
        s = part.block.smoothing
        if part.gamma2 is None or s is None:
            return x
        self.in_float(f"{s.kind} smoothing")
        bound = float(max_stable_step(eps=s.eps, kind=s.kind))
        gamma2 = min(max(float(np.asarray(part.gamma2).reshape(())), 0.0), bound)
        if not ENERGIES[s.kind].slope_is_one:
            gamma2 /= unit
        return self.add(Smooth, x, s.kind, s.steps, gamma2, s.eps / unit)

    def smooth_output(self, part: Part, x: str, unit: float) -> str:
        """Smoothing of the block's output, where asked for."""
        smoothing = part.block.smoothing
        return self.smooth(part, x, unit) if smoothing is not None and smoothing.output else x
