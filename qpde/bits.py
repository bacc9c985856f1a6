"""Bits that a network runs at."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "EXACT_BITS",
    "EXACT_LIMIT",
    "LARGEST_BITS",
    "SMALLEST_BITS",
    "Bits",
    "distinct_bits",
    "parse_bits",
    "stack_bits",
]

SMALLEST_BITS, LARGEST_BITS = 2, 32
EXACT_BITS = 16
"""From here on a quantizer clips and rounds nothing."""

EXACT_LIMIT = 2**24
"""Whole numbers below it are exact in float32, and so are their sums in any order."""


class Bits(NamedTuple):
    """Bits of a network's quantizers: a pytree, whose values may be traced, so that changing them never recompiles.

    `None` takes a quantizer out (exact weights, unclipped activations). A scalar holds for every block; an
    array with one value per block gives each block its own. Bits are 2 to 32; from 16 on a quantizer
    clips and does not round, which makes the `twin` of a network.

    Attributes:
      weights: Bits of the convolution kernels inside blocks: None, scalar or (blocks,).
      activations: Bits of the feature maps inside blocks: None, scalar or (blocks,).
    """

    weights: Any = None
    activations: Any = None

    @property
    def twin(self) -> "Bits":
        """Bits of the high-precision twin, whose activations are clipped and not rounded.

        They are 32 in the form of the given ones, so that both networks share one compiled program.
        """

        def exact(width):
            return jnp.full_like(width, LARGEST_BITS) if hasattr(width, "dtype") else LARGEST_BITS

        return self._replace(activations=jax.tree.map(exact, self.activations))


def stack_bits(rows: Sequence[Bits]) -> Bits:
    """Several widths as one `Bits` with a leading axis, for `jax.vmap` or `jax.lax.map`.

    Args:
      rows: at least one. A part that is None is None in all of them; where one of them has a value for each block, all
        get one for each block.
    Returns:
      `Bits` of int32 arrays (rows,) or (rows, blocks), or None.
    Raises:
      ValueError: no rows, a width that is not a whole number from 2 to 32, a part that is None in some rows only, or
        values for different numbers of blocks.
    """
    if not rows:
        raise ValueError("there are no bits: give at least one qpde.Bits")
    return Bits(*(_stack_part(name, [getattr(row, name) for row in rows]) for name in Bits._fields))


def _stack_part(name: str, widths: list[Any]) -> Any:
    if all(width is None for width in widths):
        return None
    if any(width is None for width in widths):
        raise ValueError(f"some {name} have bits and others None: give 32, which rounds nothing, in place of None")
    arrays = [np.asarray(width, np.float64) for width in widths]
    for array in arrays:
        if outside := [float(v) for v in array.flat if not (2 <= v <= LARGEST_BITS and v == int(v))]:
            raise ValueError(f"bits of {name} (={outside[0]:g}) must be a whole number from 2 to {LARGEST_BITS}")
    shapes = {array.shape for array in arrays} - {()}
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        raise ValueError(f"bits of {name} have shapes {sorted(shapes)}: give one value, or one for each block")
    shape = shapes.pop() if shapes else ()
    return jnp.asarray(np.stack([np.broadcast_to(array, shape) for array in arrays]), jnp.int32)


def parse_bits(text: str) -> Bits:
    """Read "W4A8" or "4" as `Bits`.

    Args:
      text: W, bits of weights, A and bits of activations; or one number for both. From 2 to 32.
    Raises:
      ValueError: Any other text, or bits outside 2 to 32.
    """
    found = re.fullmatch(r"W(\d+)A(\d+)|(\d+)", text)
    if not found:
        raise ValueError(f"bits {text!r} are neither like W4A8 nor a number of bits")
    weights, activations, both = found.groups()
    bits = Bits(*(int(width) for width in ((both, both) if both else (weights, activations))))
    if not all(2 <= width <= 32 for width in bits):
        raise ValueError(f"bits {text!r} must lie in 2 to 32 bits")
    return bits


def distinct_bits(texts: Sequence[str]) -> list[Bits]:
    """Read several texts by `parse_bits`, and leave out what occurs again.

    Args:
      texts: As for `parse_bits`. Their order is kept.
    Raises:
      ValueError: As `parse_bits`.
    """
    return list(dict.fromkeys(map(parse_bits, texts)))
