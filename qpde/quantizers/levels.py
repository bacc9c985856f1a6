"""Level sets: the numbers of [0, 1] that a magnitude of a few bits can take, and the nearest of them.

    uniform    i / n, i = 0 .. n = 2^bits - 1
    pot        0 and powers of two, down to 2^-(2^bits - 2)
    apot       additive powers of two (Li, Dong and Wang, ICLR 2020), normalised to maximum 1

A new set is one row of `LEVEL_SETS`, and its name in `Levels`.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qpde.bits import EXACT_BITS

__all__ = ["INVERSE_STEPS", "LEVEL_SETS", "STEPS", "LevelSet", "Levels", "look_up"]

Levels: TypeAlias = Literal["uniform", "pot", "apot"]
"""Names of the level sets: the keys of `LEVEL_SETS`, for annotations."""

# Level sets. Each rounds t in [-n, n] to the nearest level of a magnitude of `bits` bits, an int or a traced one.


class LevelSet(NamedTuple):
    """How a set of levels rounds, and numbers its levels."""

    snap: Callable[[Array, Array | int], Array]
    number: Callable[[Array, Array | int], Array]  # of a snapped magnitude, see `level_index`
    has_steps: bool  # levels are the integers up to n = 2^bits - 1; otherwise n = 1
    largest_bits: int


def _snap_uniform(t, bits):
    del bits
    # jnp.round, but four times as fast on XLA's CPU backend: adding 1.5 * 2^(mantissa bits) leaves t, rounded half to
    # even, in the last bits. Read as integers, lest the sum be simplified away; integers also know no -0.
    mantissa_bits = jnp.finfo(t.dtype).nmant
    shift = np.array(1.5 * 2.0**mantissa_bits, t.dtype)
    pattern = shift.view(np.int32 if mantissa_bits == 23 else np.int64)
    return (jax.lax.bitcast_convert_type(t + shift, pattern.dtype) - pattern).astype(t.dtype)


def _snap_pot(t, bits):
    magnitude = jnp.abs(t).astype(jnp.float32)
    # Adding one less than half the mantissa carries into the exponent what lies above 1.5 times a power of two.
    pattern = jax.lax.bitcast_convert_type(magnitude, jnp.int32) + 0x3FFFFF
    power = jax.lax.bitcast_convert_type(pattern & 0x7F800000, jnp.float32)
    smallest = look_up(_POT_SMALLEST, bits, jnp.float32)
    level = jnp.where(magnitude > 0.5 * smallest, jnp.maximum(power, smallest), 0.0)
    return jnp.sign(t) * level.astype(t.dtype)


def _snap_apot(t, bits):
    table, starts, counts = _apot_table()
    start: Array | float
    count: Array | float
    if isinstance(bits, int):
        table, start, count = table[starts[bits] :][: counts[bits] + 1], 0, float(counts[bits])
    else:
        start, count = look_up(starts, bits, jnp.int32), look_up(counts, bits, t.dtype)
    interval = start + jnp.ceil(jnp.abs(t) * count).astype(jnp.int32)
    level = jnp.asarray(table, t.dtype).at[interval].get(mode="clip")
    return jnp.sign(t) * level


def _number_uniform(magnitude, bits):
    del bits
    return magnitude.astype(jnp.int32)


def _number_pot(magnitude, bits):
    del bits
    return jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32) >> 23  # the exponent


def _number_apot(magnitude, bits):
    units = look_up(_apot_table()[2] / 2, bits, jnp.float32)
    return jnp.round(magnitude.astype(jnp.float32) * units).astype(jnp.int32)


LEVEL_SETS = {
    "uniform": LevelSet(_snap_uniform, _number_uniform, has_steps=True, largest_bits=EXACT_BITS),
    "pot": LevelSet(_snap_pot, _number_pot, has_steps=False, largest_bits=8),
    "apot": LevelSet(_snap_apot, _number_apot, has_steps=False, largest_bits=8),
}

# Indexed by the bits of a magnitude, from 1. Tables rather than formulas, so that static and traced bits give the same
# float on every device.
STEPS = 2.0 ** np.arange(EXACT_BITS + 1) - 1
INVERSE_STEPS = 1 / np.maximum(STEPS, 1)
# 2^-(2^bits - 2), but not so small that float32 would lose the midpoint to zero.
_POT_SMALLEST = 2.0 ** -np.minimum(2.0 ** np.arange(9) - 2, 125)


@cache
def _apot_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each number of bits the nearest level in every interval ((k - 1) / count, k / count].

    The levels are multiples of 2 / count, so a midpoint is never inside an interval and one look-up finds the level.
    """
    tables, counts = [np.zeros(1)], [0]
    for bits in range(1, 9):
        levels = _apot_units(bits)
        midpoints = levels[1:] + levels[:-1]  # in half units
        tables.append(levels[np.searchsorted(midpoints, np.arange(2 * levels[-1] + 1))] / levels[-1])
        counts.append(2 * levels[-1])
    starts = np.cumsum([0] + [len(table) for table in tables[:-1]])
    return np.concatenate(tables), starts, np.array(counts)


def _apot_units(bits: int) -> np.ndarray:
    """The additive powers of two of `bits` bits, sorted, as integers (their common scale is free).

    Bits are spent in pairs: with m = bits // 2 pairs, pair i adds one of {0, 2^-i, 2^-(i+m), 2^-(i+2m)}; the odd bit,
    if there is one, adds 0 or 2^-2m, and the last exponents of the pairs move down one place to make room.
    """
    pairs, odd = divmod(bits, 2)
    terms = [(i, i + pairs, i + 2 * pairs + odd) for i in range(pairs)] + [(2 * pairs,)] * odd
    last = max(exponent for term in terms for exponent in term)
    sums = np.zeros(1, np.int64)
    for term in terms:
        sums = np.add.outer(sums, [0, *(2 ** (last - exponent) for exponent in term)]).ravel()
    return np.sort(sums)


def look_up(table: np.ndarray, index: Array | int, dtype) -> Array | float:
    """An entry of a table, by a static or a traced index."""
    if isinstance(index, int):
        return float(table[index])
    return jnp.asarray(table, dtype).at[index].get(mode="clip")
