"""What each part of a network is in operations, in the units of `qpde.deploy.folding`.

A rule takes the name of a block's input, in units of its first quantizer, and returns that of its output, in which 1
stands for the real number `unit_out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qpde.deploy.builder import Builder
from qpde.deploy.parts import Outer, Part
from qpde.deploy.program import Affine, Concat, Mean, Pool, Quantize, Resize
from qpde.models.images.block import Block
from qpde.models.images.blocks import BasicBlock, InvertedBlock, StableBlock
from qpde.models.images.decoders import ConvBlock, PooledBlock, SeparableBlock
from qpde.models.layers import TINY

__all__ = ["head_of", "neck_of", "rule_of", "stem_of"]

PIXEL_BITS, PIXEL_LIMIT, PIXEL_UNIT = 9, 255, 2.0**-6
"""Codes of the images where the stem has 8 bits: 9 bits for numbers within +-4, about the step of an 8-bit pixel that
was divided by its standard deviation. More bits would leave the thresholds no room, see `qpde.deploy.settle`."""


def rule_of(block: Block) -> Callable:
    """The rule (build, part, x, unit_out) -> output of a block; ValueError where its kind has none."""
    for kind, rule in _RULES.items():
        if isinstance(block, kind):
            return rule
    raise ValueError(
        f"blocks of kind {type(block).__name__} have no integer form: use one of "
        f"{', '.join(kind.__name__ for kind in _RULES)}, or add a rule"
    )


def _hidden(build: Builder, part: Part, sums: str, m: Any, b: Any, index: int) -> str:
    """Q(S(relu(m sums + b))) with m and b in real numbers."""
    unit = part.unit(index)
    x = build.relu(build.affine((sums, m / unit), bias=b / unit))
    return build.quantize(part, build.smooth(part, x, unit), index)


def _branch(build: Builder, part: Part, q: str, stride: int, dilations: tuple[int, int]) -> tuple[str, Any, Any]:
    """The residual branch as (sums, factor, bias) in real numbers: what the shortcut loses."""
    block, unit = part.block, part.unit(0)
    if block.symmetric:
        return _symmetric_branch(build, part, q, unit, part.unit(1), {"kernel1": {"dilation": dilations[0]}})
    sums, scale = build.conv(part, q, "kernel1", stride=stride, dilation=dilations[0])
    g, b = part.norm("norm1")
    z = _hidden(build, part, sums, g * scale * unit, b, 1)
    sums, scale = build.conv(part, z, "kernel2", dilation=dilations[1])
    g, b = part.norm("norm2")
    return sums, g * scale * part.unit(1), b


def _symmetric_branch(
    build: Builder, part: Part, q: str, unit: float, hidden_unit: float, kernels: dict[str, dict[str, Any]]
):
    """h K^T N1(K x): K is a chain of convolutions, given with their options."""
    block = part.block
    scale: Any = np.float64(1)
    d: Any
    sums = q
    for name, options in kernels.items():
        sums, own = build.conv(part, sums, name, **options)
        scale = scale * own
    if block.norm == "separate":
        g, b = part.norm("norm1")
        step_size, d = part.step_size, np.float64(1)
    else:
        g, b, step_size = part.tied()
        d = g
    z = _hidden(build, part, sums, g * scale * unit, b, 1)
    # Sums over the hidden channels: what differs from one to the next cannot leave them.
    d = d * scale
    if d.ndim:
        reason = f"D of the {block.norm} norm" if block.norm != "separate" else "the clip of each channel"
        build.in_float(f"K^T z, as {reason} varies along its sums")
        z, d = build.affine((z, d)), np.float64(1)
    for name, options in reversed(kernels.items()):
        z, _ = build.conv(part, z, name, adjoint=True, **options)
    if block.norm != "separate":
        return z, step_size * d * hidden_unit, np.float64(0)
    g, b = part.norm("norm2")
    return z, step_size * g * d * hidden_unit, step_size * b


def _basic(build: Builder, part: Part, x: str, unit_out: float) -> str:
    block, unit = part.block, part.unit(0)
    q = build.quantize(part, x, 0)
    shortcut = build.shortcut(part, x, q)
    sums, a, b = _branch(build, part, q, block.stride, (block.dilation, block.dilation_after))
    r: Any = np.float64(unit)
    shift: Any = np.float64(0)
    if isinstance(block, BasicBlock) and block.has_projection:
        shortcut, scale = build.conv(part, shortcut, "shortcut_kernel", stride=block.stride, padding=0)
        r, shift = part.norm("shortcut_norm")
        r = r * scale * unit
    out = build.affine((shortcut, r / unit_out), (sums, -a / unit_out), bias=(shift - b) / unit_out)
    return build.smooth_output(part, build.relu(out), unit_out)


def _stable(build: Builder, part: Part, x: str, unit_out: float) -> str:
    block, r = part.block, np.float64(part.unit(0) / unit_out)
    q = build.quantize(part, x, 0)
    shortcut = build.shortcut(part, x, q)
    sums, a, b = _branch(build, part, q, 1, (block.dilation, block.dilation))
    out = build.relu(build.affine((shortcut, r), (sums, -a / unit_out), bias=-b / unit_out))
    if block.width_out > block.width_in:
        copied = build.affine((shortcut, r))
        out = build.add(Concat, out, copied, block.width_out - block.width_in)
    if block.stride == 2:
        build.in_float("the average before the next quantizer")
        out = build.add(Pool, out)
    return build.smooth_output(part, out, unit_out)


def _inverted(build: Builder, part: Part, x: str, unit_out: float) -> str:
    block, unit = part.block, part.unit(0)
    q = build.quantize(part, x, 0)
    shortcut = build.shortcut(part, x, q)
    if block.symmetric:
        depthwise = {"padding": None if getattr(block, "padded", False) else 0, "dilation": block.dilation}
        kernels: dict[str, dict[str, Any]] = {"kernel1": {}, "kernel2": depthwise}
        sums, a, b = _symmetric_branch(build, part, q, unit, part.unit(1), kernels)
    else:
        z = q
        for i in (1, 2):
            options = {"stride": block.stride, "dilation": block.dilation} if i == 2 else {}
            sums, scale = build.conv(part, z, f"kernel{i}", **options)
            g, b = part.norm(f"norm{i}")
            z = _hidden(build, part, sums, g * scale * part.unit(i - 1), b, i)
        sums, scale = build.conv(part, z, "kernel3")
        g, b = part.norm("norm3")
        a = g * scale * part.unit(2)
    if block.symmetric or (block.stride == 1 and block.width_in == block.width_out):
        out = build.affine((shortcut, unit / unit_out), (sums, -a / unit_out), bias=-b / unit_out)
    else:
        out = build.affine((sums, a / unit_out), bias=b / unit_out)
    return build.smooth_output(part, out, unit_out)


def _convolved(build: Builder, part: Part, x: str, unit_out: float) -> str:
    """A block of a decoder: convolutions of codes, each with norm, ReLU and smoothing."""
    if isinstance(part.block, PooledBlock):
        build.in_float("the mean before the quantizer")
        x = build.add(Mean, x)
    names = list(part.block.kernel_shapes())
    for i, name in enumerate(names):
        q = build.quantize(part, x, i)
        sums, scale = build.conv(part, q, name, dilation=part.block.dilation if i == 0 else 1)
        g, b = part.norm(f"norm{i + 1}")
        unit = unit_out if name == names[-1] else part.unit(i + 1)
        x = build.relu(build.affine((sums, g * scale * part.unit(i) / unit), bias=b / unit))
        if not isinstance(part.block, PooledBlock):
            x = build.smooth(part, x, unit)
    return x


_RULES: dict[type[Block], Callable] = {
    StableBlock: _stable,
    BasicBlock: _basic,
    InvertedBlock: _inverted,
    ConvBlock: _convolved,
    SeparableBlock: _convolved,
}


def stem_of(build: Builder, name: str, stem: Outer, x: str, unit_out: float) -> str:
    """relu(N(K x)); images are rounded first where the kernel is."""
    unit, reasons = 1.0, stem.reasons
    if stem.bits is not None and x == "images":
        scaled = build.affine((x, 1 / PIXEL_UNIT))
        x, unit, reasons = build.add(Quantize, scaled, -PIXEL_LIMIT, PIXEL_LIMIT, name="stem.q0"), PIXEL_UNIT, []
    sums = build.conv_of(f"{name}.kernel", stem.kernel, x, stride=stem.stride)
    g, b = stem.norm()
    out = build.relu(build.affine((sums, g * stem.scale * unit / unit_out), bias=b / unit_out))
    build.reasons = reasons
    build.note(name, stem.bits, PIXEL_BITS if not reasons else None)
    return out


def neck_of(build: Builder, neck: Outer, x: str) -> str:
    """relu(N(K x)) in real units."""
    sums = build.conv_of("neck.kernel", neck.kernel, x)
    g, b = neck.norm()
    out = build.relu(build.affine((sums, g * neck.scale), bias=b))
    build.reasons = neck.reasons
    build.note("neck", neck.bits, None)
    return out


def head_of(build: Builder, head: Outer, x: str, *, of_pixels: bool) -> None:
    """The logits of the mean over the map, or of every pixel."""
    gain = np.float64(1)
    if "mean_square" in head.stats:
        gain = 1 / np.sqrt(max(float(head.stats["mean_square"]), TINY))
    sums = build.conv_of("head.kernel", head.kernel, x if of_pixels else build.add(Mean, x))
    factor, bias = np.asarray(head.scale * gain, np.float32), head.params["bias"].astype(np.float32)
    if of_pixels:
        build.add(Resize, build.affine((sums, factor), bias=bias), "images", name="logits")
    else:
        build.add(Affine, (sums,), (factor,), bias, name="logits")
    build.reasons = head.reasons
    build.note("head", head.bits, None)
