"""Move the rounding thresholds of a folded network away from every sum that it can reach.

A code is round(m J + b) of a whole number J: the sums of one convolution, or p q + s J_2 where a shortcut is added. The
code changes where J passes T_k = (k + 1/2 - b) / m, and evaluation in float32 errs there by less than

    2^-24 ((|k| + 1/2 + |b|) + (|k| + 1/2)),

the product's rounding and the sum's, whether or not they are fused. If no T_k is that near to a whole number, every
evaluation gives the same code: any order, any device, any compiler flag.

`settle` moves b to the middle of the interval that gives the same codes for all J, which changes nothing. To make J of
a sum of two, it moves the ratio of their factors to the nearest p / s with p from 64 to 127, at most 0.8% and mostly
far less. Where a channel's interval is still too short, it moves m by some 1/4096, as little as is enough. It needs no
data.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qpde.deploy.folded import Folded
from qpde.deploy.program import (
    EXACT_LIMIT,
    Affine,
    Clip,
    Op,
    Program,
    Quantize,
    consumers,
    whole_bounds,
)

__all__ = ["Margin", "margins", "settle"]

_SAFETY = 4  # times float32's error that settling aims at
_LARGEST_MOVE = 28  # of m, in 1/4096: 0.7%, as much as the ratio p / s may take
_SMALLEST_P = 64
_LARGEST_CODES = 256  # values of a first summand that are looked at one by one


@dataclasses.dataclass(frozen=True)
class Margin:
    """How far a quantizer's thresholds are from every reachable sum.

    Attributes:
      name: Name of the quantizer, "block0.q0" and so on.
      margin: Distance of the nearest channel, in units of one code. 0 where it cannot be told.
      float_error: Bound of float32's error at that channel's thresholds.
      reason: Why the distance cannot be told, or "".
    """

    name: str
    margin: float
    float_error: float
    reason: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether no float32 evaluation can change a code."""
        return self.margin > self.float_error


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """A quantizer and the affine in front of it, whose values nobody else reads."""

    affine: Affine
    quantize: Quantize
    low: int
    high: int

    @property
    def thresholds(self) -> np.ndarray:
        return np.arange(self.low, self.high) + 0.5


def _roundings(program: Program) -> list[_Rounding]:
    made, readers, found = {op.out: op for op in program.ops}, consumers(program.ops), []
    for op in program.ops:
        if not isinstance(op, Quantize):
            continue
        before, low = made.get(op.x), op.low
        if isinstance(before, Clip) and (before.low, before.high) == (0, math.inf) and len(readers[op.x]) == 1:
            before, low = made.get(before.x), max(low, 0)
        if isinstance(before, Affine) and len(readers[before.out]) == 1:
            found.append(_Rounding(before, op, low, op.high))
    return found


def margins(folded: Folded) -> list[Margin]:
    """Measure how far every rounding threshold is from every reachable sum.

    Args:
      folded: Result of `fold` or `settle`.
    Returns:
      One `Margin` for each uniform quantizer, in order. A network all of whose margins are safe gives the same codes in
      every runtime.
    """
    bounds, roundings = whole_bounds(folded), {r.quantize.out: r for r in _roundings(folded)}
    return [_margin(op.out, roundings.get(op.out), bounds) for op in folded.ops if isinstance(op, Quantize)]


def _margin(name: str, rounding: _Rounding | None, bounds: dict) -> Margin:
    if rounding is None:
        return Margin(name, 0.0, math.inf, "real numbers arrive")
    affine = rounding.affine
    if affine.inputs == ("images",):
        return Margin(name, math.inf, 0.0)  # one product with a power of two: exact
    unknown = [x for x in affine.inputs if x not in bounds]
    if unknown:
        return Margin(name, 0.0, math.inf, "real numbers arrive")
    if max(abs(end) for x in affine.inputs for end in bounds[x]) >= EXACT_LIMIT:
        return Margin(name, 0.0, math.inf, "sums pass 2^24")
    m, b = (np.atleast_1d(v).astype(np.float64) for v in (affine.factors[-1], affine.shift))
    m, b = np.broadcast_arrays(m, b)
    if len(affine.inputs) == 1:
        shifts = np.zeros(1)
        first = np.zeros_like(m)
    else:
        low, high = bounds[affine.inputs[0]]
        if len(affine.inputs) > 2 or high - low >= _LARGEST_CODES:
            return Margin(name, 0.0, math.inf, "two sums are added: settle makes one whole number of them")
        shifts = np.arange(low, high + 1, dtype=np.float64)
        first = np.broadcast_to(np.atleast_1d(affine.factors[0]).astype(np.float64), m.shape)
    largest = np.abs(first).max() * np.abs(shifts).max()
    distances, errors = [], []
    for m_c, b_c, f_c in zip(m, b, first, strict=True):
        offsets = (b_c + f_c * shifts)[:, None]
        distances.append(_distance(m_c, offsets, rounding.thresholds[None], bounds[affine.inputs[-1]]))
        errors.append(_float_error(rounding, abs(b_c) + 2 * largest))
    worst = int(np.argmin(np.array(distances) - np.array(errors)))
    return Margin(name, float(distances[worst]), float(errors[worst]))


def _float_error(rounding: _Rounding, b: float | np.ndarray) -> float | np.ndarray:
    largest = max(abs(rounding.low), abs(rounding.high)) + 0.5
    return 2.0**-24 * (2 * largest + b)


def _distance(m: float, offset: np.ndarray | float, thresholds: np.ndarray, bounds: tuple[int, int]) -> float:
    """Least |m J + offset - threshold| over whole J within the bounds."""
    if m == 0:
        return float(np.abs(offset - thresholds).min())
    nearest = np.clip(np.round((thresholds - offset) / m), *bounds)
    return float(np.abs(m * nearest + offset - thresholds).min())


def settle(folded: Folded) -> Folded:
    """Move factors and biases by the least that puts every rounding threshold away from every reachable sum.

    Only roundings of whole sums can be settled, and those with room for float32; the others stay as they are, most of
    those at 8 bits of activations among them. `margins` of the result says which are safe.

    Args:
      folded: Result of `fold`.
    Returns:
      The same network with `settled` True. Its function differs where a factor moved, by less than 0.8% of it.
    """
    bounds, changed = whole_bounds(folded), {}
    for rounding in _roundings(folded):
        affine = rounding.affine
        if affine.inputs != ("images",) and all(x in bounds for x in affine.inputs) and len(affine.inputs) <= 2:
            changed[affine.out] = _settled(rounding, bounds)
    ops = [new for op in folded.ops for new in changed.get(op.out, [op])]
    return dataclasses.replace(folded, ops=tuple(ops), settled=True)


def _settled(rounding: _Rounding, bounds: dict) -> list[Op]:
    affine, ops, name = rounding.affine, [], rounding.affine.inputs[0]
    m, limits = affine.factors[0], bounds[name]
    if len(affine.inputs) == 2:
        f1, f2 = np.broadcast_arrays(*(np.atleast_1d(f).astype(np.float64) for f in affine.factors))
        p, s = (np.array(v, np.float64) for v in zip(*map(_whole_ratio, f1, f2), strict=True))
        m = np.where(p != 0, f1 / np.where(p == 0, 1, p), f2)
        name = f"{affine.out}.whole"
        whole = Affine(name, affine.inputs, (p.astype(np.float32), s.astype(np.float32)))
        low, high = _ends(whole, bounds)
        if max(-low.min(), high.max()) >= EXACT_LIMIT:
            return [affine]
        ops, limits = [whole], (int(low.min()), int(high.max()))
    m, b = np.broadcast_arrays(np.atleast_1d(m), np.atleast_1d(affine.shift))
    new = [_settled_channel(float(m_c), float(b_c), rounding, limits) for m_c, b_c in zip(m, b, strict=True)]
    if None in new:
        return [affine]
    m, b = (np.array(v, np.float32) for v in zip(*new, strict=True))
    return [*ops, Affine(affine.out, (name,), (m,), b)]


def _ends(op: Affine, bounds: dict) -> tuple[np.ndarray, np.ndarray]:
    low = high = np.zeros(())
    for x, f in zip(op.inputs, op.factors, strict=True):
        ends = [f.astype(np.float64) * end for end in bounds[x]]
        low, high = low + np.minimum(*ends), high + np.maximum(*ends)
    return low, high


def _whole_ratio(f1: float, f2: float) -> tuple[int, int]:
    """(p, s) with f1 : f2 nearly p : s."""
    if f2 == 0:
        return 1, 0
    if f1 == 0:
        return 0, 1
    ratio = abs(f2 / f1)
    p = np.arange(_SMALLEST_P, 2 * _SMALLEST_P)
    if ratio * _SMALLEST_P < 1:
        p = np.round(np.arange(1, max(2, int(2 * _SMALLEST_P * ratio) + 1)) / ratio)
    s = np.maximum(np.round(p * ratio), 1)
    best = int(np.argmin(np.abs(s / p / ratio - 1)))
    return int(p[best]), int(math.copysign(s[best], f1 * f2))


def _settled_channel(m: float, b: float, rounding: _Rounding, limits: tuple[int, int]) -> tuple[float, float] | None:
    """m and b with room at every threshold: m as near to the old one as is enough, else with the most room.

    None where none has enough.
    """
    if m == 0:
        return m, b
    found = []
    for move in sorted(range(-_LARGEST_MOVE, _LARGEST_MOVE + 1), key=abs):
        moved = float(np.float32(m * (1 + move / 4096)))
        middle = float(np.float32(_middle(moved, b, rounding.thresholds, limits)))
        room = _distance(moved, middle, rounding.thresholds, limits)
        spare = room / float(_float_error(rounding, abs(middle)))
        if spare >= _SAFETY:
            return moved, middle
        found.append((spare, moved, middle))
    spare, moved, middle = max(found)
    return (moved, middle) if spare > 1 else None


def _middle(m: float, b: float, thresholds: np.ndarray, limits: tuple[int, int]) -> float:
    """The b in the middle of those that give the same code for every whole number within the limits."""
    t = (thresholds - b) / m
    t = t[(t > limits[0] - 1) & (t < limits[1] + 1)]
    if not len(t):
        return b
    below, above = (t - np.floor(t)).min(), (np.floor(t) + 1 - t).min()
    return b - m * (above - below) / 2
