"""Fold a trained image network into integer kernels, per-channel affines in code units, and clips.

A block's input arrives in units of one code of its first quantizer, so a code is Q(t) = clip(round(t)). With kernel
codes k and their scale s, activation units u_0, u_1 and the next block's unit u', a basic block is

    q = Q(t),   z = Q(m k * q + b),   t' = r q - a k_2 * z + b',
    m = g_1 s u_0 / u_1,   a = h g_2 s_2 u_1 / u',   r = u_0 / u'

where g and b are scale and shift of the batch norms. Where the block is symmetric, k_2 * z is the adjoint of the one
kernel. Biases stay real: rounded to whole units of the sums, they flip 19 to 34% of the codes of a 4-bit network.

Where several parts read a map, or one part reads several, it is in real units, and each reader divides by its own. Maps
of a decoder are interpolated to the size of the largest, in float32, and their channels stand side by side.

What has no form in few bits is computed in float32, and `Folded.notes` says so block by block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import unfreeze

from qpde import quantizers
from qpde.bits import EXACT_BITS, Bits
from qpde.checks import check_variables
from qpde.deploy.program import (
    EXACT_LIMIT,
    Affine,
    Clip,
    Concat,
    Conv,
    Kernel,
    Mean,
    Op,
    Pool,
    Program,
    Quantize,
    Resize,
    Smooth,
    Snap,
    accumulator_bound,
    consumers,
)
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.images.blocks import BasicBlock, Block, InvertedBlock, StableBlock
from qpde.models.images.decoders import ConvBlock, PooledBlock, SeparableBlock
from qpde.models.images.network import BoundPart, Layer, Network
from qpde.models.images.parts import ExactConv
from qpde.models.images.segmentation import SegmentationNetwork
from qpde.models.layers import NORM_EPSILON, TINY, depthwise_bits, is_depthwise
from qpde.quantizers.levels import LEVEL_SETS
from qpde.stencils import ENERGIES

__all__ = ["Folded", "Note", "State", "fold"]

PIXEL_BITS, PIXEL_LIMIT, PIXEL_UNIT = 9, 255, 2.0**-6
"""Codes of the images where the stem has 8 bits: 9 bits for numbers within +-4, about the step of an 8-bit pixel that
was divided by its standard deviation. More bits would leave the thresholds no room, see `qpde.deploy.settle`."""

_CODE_BITS = 8
_PACKED_BITS = (2, 3, 4, 8)
_LARGE_IMAGE = (4096, 4096, 3)  # large enough to tell which map is finer
_LARGEST_TABLE = 2**15  # of levels that are written as whole multiples


@dataclasses.dataclass(frozen=True)
class Note:
    """What a part of the network became.

    Attributes:
      part: "stem", "block0", ..., "neck" or "head".
      weight_bits, act_bits: Bit-widths; None is float32.
      in_float: Reasons why something in it is computed in float32, one each.
    """

    part: str
    weight_bits: int | None
    act_bits: int | None
    in_float: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class State:
    """A state of the network among the values of its program: the output of the stem or of a block.

    Attributes:
      value: Name of the value.
      unit: The real number that 1 stands for.
      relu: Whether the state is max(value, 0), as a quantizer behind it takes it.
    """

    value: str
    unit: float
    relu: bool


@dataclasses.dataclass(frozen=True)
class Folded(Program):
    """A network as integer kernels, affines and clips: what every writer of `qpde.deploy` reads.

    Attributes:
      ops, kernels: See `qpde.deploy.program`.
      name: Name of the architecture.
      channels, num_classes: Of the images and of the logits.
      smallest_image: Smallest side of an image that the network takes.
      notes: What each part became, in order.
      settled: Whether `settle` moved the rounding thresholds away from every reachable sum.
      states: Outputs of the stems and of every block, in order.
      of_pixels: Whether there are logits for every pixel.
    """

    name: str
    channels: int
    num_classes: int
    smallest_image: int
    notes: tuple[Note, ...]
    settled: bool = False
    states: tuple[State, ...] = ()
    of_pixels: bool = False

    def __str__(self) -> str:
        return self.summary()

    def check(self) -> None:
        """Raise a ValueError where an operation reads what there is not yet."""
        known = {"images"}
        for op in self.ops:
            if missing := [x for x in op.inputs if x not in known]:
                raise ValueError(f"{op.out} reads {missing[0]!r}, which no operation before it writes")
            if op.out in known:
                raise ValueError(f"{op.out!r} is written twice")
            if isinstance(op, Conv) and op.kernel not in self.kernels:
                raise ValueError(f"{op.out} needs kernel {op.kernel!r}, which is missing")
            known.add(op.out)
        if "logits" not in known:
            raise ValueError("no operation writes the logits")
        if missing := [state.value for state in self.states if state.value not in known]:
            raise ValueError(f"no operation writes the state {missing[0]!r}")

    def summary(self) -> str:
        """Each part's bit-widths, and what in it is computed in float32 and why, as text."""
        lines = [f"{self.name}{', settled' if self.settled else ''}: {len(self.kernels)} kernels"]
        for note in self.notes:
            widths = "/".join("float" if bits is None else str(bits) for bits in (note.weight_bits, note.act_bits))
            lines.append(f"  {note.part:<8} {widths:<12} {'; '.join(note.in_float) or 'integers'}")
        for name, bound in accumulator_bound(self).items():
            if bound >= EXACT_LIMIT:
                lines.append(f"  {name}: sums up to {bound:,} pass 2^24, where float32 rounds them")
        return "\n".join(lines)


def fold(
    model: Network | GraphNetwork,
    variables: Mapping[str, Any],
    *,
    bits: Bits | None = None,
    outer_bits: int | None = None,
) -> Folded:
    """Fold an image network at fixed bit-widths into one integer program.

    Norms are absorbed into affines, clips into units. The program computes what the fake-quantized network computes in
    evaluation, up to the rounding of float32.

    Args:
      model: Image network, as `qpde.models.create` makes it.
      variables: Its collections.
      bits: Bit-widths, static scalars or one value for each block. None takes the model's own.
      outer_bits: Bit-width of the kernels of stem, neck and head: 8, or None for float32. With 8 the images are rounded
        to 9 bits within +-4, and the stem's sums are whole as well.
    Returns:
      The program. `str` of it says what stays in float32, and why.
    Raises:
      ValueError: `outer_bits` other than 8; bit-widths that are traced; a kind of block without a rule; variables that
        are NaN or infinite, or clips that are not positive.
    """
    if isinstance(model, GraphNetwork):
        raise ValueError("fold takes an image network, not a graph network: use qpde.deploy.fold_graph")
    if outer_bits not in (None, 8):
        raise ValueError(f"outer_bits={outer_bits} must be 8, or None to keep stem, neck and head in float32")
    check_variables(variables, "variables")
    variables, bits = unfreeze(dict(variables)), model.checked_bits(model.bits if bits is None else bits)
    steps = model.steps(variables)
    widths = [Bits(*(_own_bits(part, i) for part in bits)) for i in range(len(steps))]
    parts = [
        _Part(f"block{i}", block, jax.tree.map(np.asarray, own), own, step_size, gamma2, width)
        for i, ((block, own, step_size, gamma2), width) in enumerate(zip(steps, widths, strict=True))
    ]
    *ends, head = [_Outer(b, outer_bits) for b in model.bound_parts(variables, bits) if not isinstance(b.part, Block)]
    stems = [name for name, _ in model.stem_parts()]
    build, units, x = _Builder(), _units(model.layers, stems, parts), "images"
    sizes = model.map_sizes(_LARGE_IMAGE)
    maps: dict[str, _Map] = {}
    states: list[tuple[str, float]] = []
    for name, stem in zip(stems, ends, strict=False):
        x = _stem(build, name, stem, x, units[name])
        maps[name] = _Map(x, units[name], sizes[name], stem.part.width_out)
        states.append((x, units[name]))
    left = iter(parts)
    for layer in model.layers:
        own = list(itertools.islice(left, len(layer.blocks)))
        x = _joined(build, layer, maps, own[0])
        for part, following in zip(own, [*own[1:], None], strict=True):
            unit_out = units[layer.name] if following is None else following.unit(0)
            x = _rule(part.block)(build, part, x, unit_out)
            states.append((x, unit_out))
            build.note(part.name, part.bits.weights, part.bits.activations)
        maps[layer.name] = _Map(x, units[layer.name], sizes[layer.name], layer.blocks[-1].width_out)
    for neck in ends[len(stems) :]:
        x = _neck(build, neck, x)
    of_pixels = isinstance(model, SegmentationNetwork)
    _head(build, head, x, of_pixels=of_pixels)
    ops, renamed = _simplified(build.ops)
    return Folded(
        ops=ops,
        kernels=build.kernels,
        name=model.architecture.name,
        channels=ends[0].part.width_in,
        num_classes=model.num_classes,
        smallest_image=model.smallest_image,
        notes=tuple(build.notes),
        states=tuple(State(renamed.get(x, x), unit, x in renamed) for x, unit in states),
        of_pixels=of_pixels,
    )


class _Map(NamedTuple):
    """A map that layers can take: its value, what 1 stands for in it, its size for a large image, and its channels."""

    value: str
    unit: float
    size: tuple[int, int]
    width: int


def _units(layers: Sequence[Layer], stems: Sequence[str], parts: Sequence[_Part]) -> dict[str, float]:
    """The real number that 1 stands for in every map: a code of its reader, where there is one that reads no other."""
    readers: dict[str, list[tuple[int, float]]] = {name: [(2, 1.0)] for name in stems[:-1]}  # the next stem
    first = 0
    for layer in layers:
        for source in layer.sources:
            readers.setdefault(source, []).append((len(layer.sources), parts[first].unit(0)))
        first += len(layer.blocks)
    alone = {name: own[0][1] for name, own in readers.items() if len(own) == 1 and own[0][0] == 1}
    return {name: alone.get(name, 1.0) for name in (*stems, *(layer.name for layer in layers))}


def _joined(build: _Builder, layer: Layer, maps: dict[str, _Map], part: _Part) -> str:
    """What a layer's first block takes, in its units: maps at the size of the largest, their channels side by side."""
    first, *others = [maps[source] for source in layer.sources]
    x = first.value
    if others:
        largest = max((first, *others), key=lambda found: found.size).value
        x = x if x == largest else build.add(Resize, x, largest)
        for other in others:
            same = other.value if other.value == largest else build.add(Resize, other.value, largest)
            x = build.add(Concat, x, same, other.width)
        build.in_float("the join of maps")
    factor = first.unit / part.unit(0)
    return x if factor == 1 else build.affine((x, factor))


def _own_bits(part: Any, index: int) -> int | None:
    if part is None:
        return None
    if isinstance(part, jax.core.Tracer):
        raise ValueError("bits are traced: fold outside of jit, at bit-widths that are Python numbers")
    value = np.asarray(part)
    return int(value if value.ndim == 0 else value[index])


# What a block is made of.


@dataclasses.dataclass(frozen=True)
class _Part:
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
        return self.variables["params"]

    def clips(self) -> dict[str, Any]:
        clips = self.block.clips_at(self.device_variables["params"], self.bits)
        weights = self.block.split_weight_clips(clips["weight_clips"])
        return {"weights": [np.asarray(c) for c in weights], "acts": np.asarray(clips["act_clips"])}

    def signed(self, index: int) -> bool:
        return index == 0 and self.block.signed_inputs

    def unit(self, index: int) -> float:
        """The real number that one code of an activation stands for; 1 where nothing is rounded."""
        bits, clip = self.bits.activations, float(self.clips()["acts"][index])
        if bits is None or bits >= EXACT_BITS:
            return 1.0
        if self.block.levels != "uniform":
            return clip / float(_table(self.block.levels, bits - self.signed(index))[-1])
        return clip / _steps(bits, self.signed(index))

    def kernel(self, name: str) -> tuple[Kernel, np.ndarray | np.floating]:
        """The kernel and its scale, () or (C_out,)."""
        index = list(self.block.kernel_shapes()).index(name)
        w, clip = self.params[name], self.clips()["weights"][index]
        bits, depthwise = self.bits.weights, is_depthwise(w.shape)
        if bits is not None and depthwise:
            bits = depthwise_bits(bits)
        if bits is not None and self.block.standardize:
            w = np.asarray(quantizers.standardize_weight(w))
        codes, scale, packed = _weight_codes(w, clip, bits, self.block.levels)
        return Kernel(codes, packed, depthwise and w.shape[3] > 1), scale

    def norm(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """g and b of a batch norm in evaluation, g x + b, in float64."""
        return _norm(self.params[name], self.variables["batch_stats"][name])

    def tied(self) -> tuple[np.ndarray, np.ndarray, float]:
        """D, the shift of D K x, and h of a tied or spectral step."""
        _, scales, step_size = self.block.factors(self.device_variables, self.step_size, self.bits)
        scale = np.asarray(scales["norm1"], np.float64)
        mean = np.asarray(self.variables["batch_stats"]["norm1"]["mean"], np.float64)
        return scale, self.params["norm1"]["bias"] - mean * scale, float(step_size)


def _norm(params: dict, stats: dict) -> tuple[np.ndarray, np.ndarray]:
    scale = params["scale"].astype(np.float64) / np.sqrt(stats["var"].astype(np.float64) + NORM_EPSILON)
    return scale, params["bias"] - stats["mean"] * scale


def _steps(bits: int, signed: bool) -> int:
    return 2 ** (bits - int(signed)) - 1


def _table(levels: str, bits: int) -> np.ndarray:
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


def _weight_codes(w: np.ndarray, clip: np.ndarray, bits: int | None, levels: str):
    """Codes (int8, or float32 where they have none), their scale, and the bits to pack them at or None."""
    if bits is None or bits > _CODE_BITS:
        rounded = quantizers.quantize_weight(w, clip, bits, levels=levels)
        return np.asarray(rounded, np.float32), np.float64(1), None
    if levels == "uniform":
        codes, scale = quantizers.encode_weight(w, clip, bits)
        return np.asarray(codes), np.asarray(scale, np.float64), next(b for b in _PACKED_BITS if b >= bits)
    table = _table(levels, bits - 1)
    values = np.asarray(quantizers.quantize_weight(w, np.ones_like(clip), bits, levels=levels))
    top = float(table[-1])
    if np.any(table != np.round(table)) or top > 127:
        return np.asarray(quantizers.quantize_weight(w, clip, bits, levels=levels)), np.float64(1), None
    values = np.asarray(quantizers.quantize_weight(w, clip, bits, levels=levels), np.float64) / clip
    packed = next(b for b in _PACKED_BITS if 2 ** (b - 1) > top)
    return np.round(values * top).astype(np.int8), clip.astype(np.float64) / top, packed


# The rules: what a block's step is in operations.


class _Builder:
    """Operations in the order in which they are added; every method returns the name of its result."""

    def __init__(self):
        self.ops: list[Op] = []
        self.kernels: dict[str, Kernel] = {}
        self.notes: list[Note] = []
        self.reasons: list[str] = []
        self.count = 0

    def note(self, part: str, weight_bits: int | None, act_bits: int | None) -> None:
        self.notes.append(Note(part, weight_bits, act_bits, tuple(dict.fromkeys(self.reasons))))
        self.reasons.clear()

    def in_float(self, reason: str) -> None:
        self.reasons.append(reason)

    def add(self, op: Callable[..., Op], *args: Any, name: str | None = None, **options: Any) -> str:
        self.count += 1
        name = f"v{self.count}" if name is None else name
        self.ops.append(op(name, *args, **options))
        return name

    def affine(self, *terms: tuple[str, Any], bias: Any = None) -> str:
        names, factors = zip(*terms, strict=True)
        factors = tuple(np.asarray(f, np.float32) for f in factors)
        return self.add(Affine, names, factors, None if bias is None else np.asarray(bias, np.float32))

    def relu(self, x: str) -> str:
        return self.add(Clip, x, 0.0, math.inf)

    def conv(self, part: _Part, x: str, name: str, **options: Any) -> tuple[str, Any]:
        """Sums of a kernel of the block, "same" padding unless another is given, and the scale of its codes."""
        kernel, scale = part.kernel(name)
        return self._conv(f"{part.name}.{name}", kernel, x, **options), scale

    def _conv(
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
        self.kernels.setdefault(key, kernel)
        if not kernel.is_whole:
            self.in_float(f"{key.split('.')[-1]} has no integer codes")
        reach = dilation * (kernel.values.shape[0] - 1)
        padding = reach // 2 if padding is None else padding
        padding = reach - padding if adjoint else padding
        return self.add(Conv, x, key, stride, padding, adjoint, dilation)

    def quantize(self, part: _Part, x: str, index: int) -> str:
        bits, signed = part.bits.activations, part.signed(index)
        if bits is None:
            self.in_float("activations are not rounded")
            return x
        if bits >= EXACT_BITS:
            self.in_float("activations are not rounded")
            clip = float(part.clips()["acts"][index])
            return self.add(Clip, x, -clip if signed else 0.0, clip)
        name = f"{part.name}.q{index}"
        if part.block.levels != "uniform":
            table = _table(part.block.levels, bits - signed)
            if np.any(table != np.round(table)):
                self.in_float(f"{part.block.levels} levels of {bits} bits are no whole multiples")
            return self.add(Snap, x, table, signed, name=name)
        top = _steps(bits, signed)
        return self.add(Quantize, x, -top if signed else 0, top, name=name)

    def shortcut(self, part: _Part, x: str, q: str) -> str:
        """Q(x), or clip(x) where the residual is precise."""
        if part.block.residual == "rounded" or part.bits.activations is None:
            return q
        self.in_float("the precise shortcut")
        top = float(part.clips()["acts"][0]) / part.unit(0)
        return self.add(Clip, x, -top if part.signed(0) else 0.0, top)

    def smooth(self, part: _Part, x: str, unit: float) -> str:
        """Smoothing in units of one code: that of TV kinds scales gamma2 with eps."""
        s = part.block.smoothing
        if part.gamma2 is None or s is None:
            return x
        gamma2 = float(np.asarray(part.gamma2).reshape(()))
        self.in_float(f"{s.kind} smoothing")
        bound = (0.25 if ENERGIES[s.kind].slope_is_one else s.eps / 4) / unit
        gamma2 = gamma2 if ENERGIES[s.kind].slope_is_one else gamma2 / unit
        bound = bound * unit if ENERGIES[s.kind].slope_is_one else bound
        return self.add(Smooth, x, s.kind, s.steps, min(max(gamma2, 0.0), bound), s.eps / unit)

    def smooth_output(self, part: _Part, x: str, unit: float) -> str:
        smoothing = part.block.smoothing
        return self.smooth(part, x, unit) if smoothing is not None and smoothing.output else x


def _rule(block: Block) -> Callable:
    for kind, rule in _RULES.items():
        if isinstance(block, kind):
            return rule
    raise ValueError(
        f"blocks of kind {type(block).__name__} have no integer form: use one of "
        f"{', '.join(kind.__name__ for kind in _RULES)}, or add a rule"
    )


def _hidden(build: _Builder, part: _Part, sums: str, m: Any, b: Any, index: int) -> str:
    """Q(S(relu(m sums + b))) with m and b in real numbers."""
    unit = part.unit(index)
    x = build.relu(build.affine((sums, m / unit), bias=b / unit))
    return build.quantize(part, build.smooth(part, x, unit), index)


def _branch(build: _Builder, part: _Part, q: str, stride: int, dilations: tuple[int, int]) -> tuple[str, Any, Any]:
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
    build: _Builder, part: _Part, q: str, unit: float, hidden_unit: float, kernels: dict[str, dict[str, Any]]
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


def _basic(build: _Builder, part: _Part, x: str, unit_out: float) -> str:
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


def _stable(build: _Builder, part: _Part, x: str, unit_out: float) -> str:
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


def _inverted(build: _Builder, part: _Part, x: str, unit_out: float) -> str:
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


def _convolved(build: _Builder, part: _Part, x: str, unit_out: float) -> str:
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


# Stem, neck and head.


class _Outer:
    """Stem, neck or head: its kernel, float32 or of 8 bits with a scale for each channel, and its parameters."""

    def __init__(self, bound: BoundPart, bits: int | None):
        self.part, self.bits = bound.part, bits
        self.stride = bound.part.stride if isinstance(bound.part, ExactConv) else 1
        self.params, self.stats = (jax.tree.map(np.asarray, bound.variables[k]) for k in ("params", "batch_stats"))
        w = self.params["kernel"]
        w = w.astype(np.float32).reshape((1,) * (4 - w.ndim) + w.shape)
        self.kernel, self.scale = Kernel(w, None), np.float64(1)
        if bits is not None:
            self.scale = np.maximum(np.abs(w).max((0, 1, 2)).astype(np.float64), 1e-30) / _steps(bits, signed=True)
            self.kernel = Kernel(np.round(w / self.scale).astype(np.int8), bits)

    def norm(self) -> tuple[np.ndarray, np.ndarray]:
        return _norm(self.params["norm"], self.stats["norm"])

    @property
    def reasons(self) -> list[str]:
        return ["float32 kernel" if self.bits is None else "float32 input"]


def _stem(build: _Builder, name: str, stem: _Outer, x: str, unit_out: float) -> str:
    unit, reasons = 1.0, stem.reasons
    if stem.bits is not None and x == "images":
        scaled = build.affine((x, 1 / PIXEL_UNIT))
        x, unit, reasons = build.add(Quantize, scaled, -PIXEL_LIMIT, PIXEL_LIMIT, name="stem.q0"), PIXEL_UNIT, []
    sums = build._conv(f"{name}.kernel", stem.kernel, x, stride=stem.stride)
    g, b = stem.norm()
    out = build.relu(build.affine((sums, g * stem.scale * unit / unit_out), bias=b / unit_out))
    build.reasons = reasons
    build.note(name, stem.bits, PIXEL_BITS if not reasons else None)
    return out


def _neck(build: _Builder, neck: _Outer, x: str) -> str:
    sums = build._conv("neck.kernel", neck.kernel, x)
    g, b = neck.norm()
    out = build.relu(build.affine((sums, g * neck.scale), bias=b))
    build.reasons = neck.reasons
    build.note("neck", neck.bits, None)
    return out


def _head(build: _Builder, head: _Outer, x: str, *, of_pixels: bool) -> None:
    gain = np.float64(1)
    if "mean_square" in head.stats:
        gain = 1 / np.sqrt(max(float(head.stats["mean_square"]), TINY))
    sums = build._conv("head.kernel", head.kernel, x if of_pixels else build.add(Mean, x))
    factor, bias = np.asarray(head.scale * gain, np.float32), head.params["bias"].astype(np.float32)
    if of_pixels:
        build.add(Resize, build.affine((sums, factor), bias=bias), "images", name="logits")
    else:
        build.add(Affine, (sums,), (factor,), bias, name="logits")
    build.reasons = head.reasons
    build.note("head", head.bits, None)


def _simplified(ops: list[Op]) -> tuple[tuple[Op, ...], dict[str, str]]:
    """Without the ReLUs whose readers all clip at 0 or above themselves, and without what nobody reads.

    Also what each of those ReLUs read, by its name.
    """

    def clips_again(op):
        return (isinstance(op, (Clip, Quantize)) and op.low >= 0) or (isinstance(op, Snap) and not op.signed)

    readers, kept = consumers(ops), []
    renamed: dict[str, str] = {}
    for op in ops:
        own = readers.get(op.out, [])
        if isinstance(op, Clip) and (op.low, op.high) == (0, math.inf) and own and all(map(clips_again, own)):
            renamed[op.out] = renamed.get(op.x, op.x)
        else:
            kept.append(_renamed(op, renamed))
    while True:
        readers = consumers(kept)
        alive = [op for op in kept if op.out in readers or op.out == "logits"]
        if len(alive) == len(kept):
            return tuple(kept), renamed
        kept = alive


def _renamed(op: Op, names: dict[str, str]) -> Op:
    if isinstance(op, Affine):
        return dataclasses.replace(op, inputs=tuple(names.get(x, x) for x in op.inputs))
    changed: dict[str, Any] = {f: names[v] for f in ("x", "y", "like") if (v := getattr(op, f, None)) in names}
    return dataclasses.replace(op, **changed) if changed else op
