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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import unfreeze

from qpde.bits import Bits
from qpde.checks import check_variables
from qpde.deploy.builder import Builder
from qpde.deploy.folded import Folded, State
from qpde.deploy.parts import Outer, Part
from qpde.deploy.program import Affine, Clip, Concat, Op, Quantize, Resize, Snap, consumers
from qpde.deploy.rules import head_of, neck_of, rule_of, stem_of
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.images.block import Block
from qpde.models.images.network import Layer, Network
from qpde.models.images.segmentation import SegmentationNetwork

__all__ = ["fold"]

_LARGE_IMAGE = (4096, 4096, 3)  # large enough to tell which map is finer


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
        Part(f"block{i}", block, jax.tree.map(np.asarray, own), own, step_size, gamma2, width)
        for i, ((block, own, step_size, gamma2), width) in enumerate(zip(steps, widths, strict=True))
    ]
    *ends, head = [Outer(b, outer_bits) for b in model.bound_parts(variables, bits) if not isinstance(b.part, Block)]
    stems = [name for name, _ in model.stem_parts()]
    build, units, x = Builder(), _units(model.layers, stems, parts), "images"
    sizes = model.map_sizes(_LARGE_IMAGE)
    maps: dict[str, _Map] = {}
    states: list[tuple[str, float]] = []
    for name, stem in zip(stems, ends, strict=False):
        x = stem_of(build, name, stem, x, units[name])
        maps[name] = _Map(x, units[name], sizes[name], stem.part.width_out)
        states.append((x, units[name]))
    left = iter(parts)
    for layer in model.layers:
        own = list(itertools.islice(left, len(layer.blocks)))
        x = _joined(build, layer, maps, own[0])
        for part, following in zip(own, [*own[1:], None], strict=True):
            unit_out = units[layer.name] if following is None else following.unit(0)
            x = rule_of(part.block)(build, part, x, unit_out)
            states.append((x, unit_out))
            build.note(part.name, part.bits.weights, part.bits.activations)
        maps[layer.name] = _Map(x, units[layer.name], sizes[layer.name], layer.blocks[-1].width_out)
    for neck in ends[len(stems) :]:
        x = neck_of(build, neck, x)
    of_pixels = isinstance(model, SegmentationNetwork)
    head_of(build, head, x, of_pixels=of_pixels)
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


def _units(layers: Sequence[Layer], stems: Sequence[str], parts: Sequence[Part]) -> dict[str, float]:
    """The real number that 1 stands for in every map: a code of its reader, where there is one that reads no other."""
    readers: dict[str, list[tuple[int, float]]] = {name: [(2, 1.0)] for name in stems[:-1]}  # the next stem
    first = 0
    for layer in layers:
        for source in layer.sources:
            readers.setdefault(source, []).append((len(layer.sources), parts[first].unit(0)))
        first += len(layer.blocks)
    alone = {name: own[0][1] for name, own in readers.items() if len(own) == 1 and own[0][0] == 1}
    return {name: alone.get(name, 1.0) for name in (*stems, *(layer.name for layer in layers))}


def _joined(build: Builder, layer: Layer, maps: dict[str, _Map], part: Part) -> str:
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
