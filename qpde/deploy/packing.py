"""Codes of 2, 3, 4 and 8 bits as bytes: the first code in the low bits, two's complement.

Code i takes the bits from i * bits on of one long little-endian number, so codes of 3 bits may straddle two bytes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["PACKED_BITS", "pack", "packed_size", "unpack", "unpack_traced"]

PACKED_BITS = (2, 3, 4, 8)


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    _check_bits(bits)
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack whole numbers into bytes.

    Args:
      codes: int8 of any shape, within [-2^(bits-1), 2^(bits-1) - 1].
      bits: 2, 3, 4 or 8.
    Returns:
      uint8 (bytes,), the last byte filled up with zeros.
    Raises:
      ValueError: Another number of bits, or a code that does not fit.

    >>> pack(np.array([1, -1, 0, 1], np.int8), 2).tolist()
    [77]
    """
    _check_bits(bits)
    flat = np.asarray(codes).reshape(-1).astype(np.int64)
    half = 2 ** (bits - 1)
    if flat.size and not -half <= flat.min() <= flat.max() < half:
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits: [{-half}, {half - 1}]")
    spread = (flat[:, None] >> np.arange(bits)) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little")


def unpack(data: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read codes back.

    Args:
      data: uint8 (bytes,), as `pack` makes it.
      bits: 2, 3, 4 or 8.
      shape: Shape of the codes.
    Returns:
      int8 array.
    Raises:
      ValueError: Another number of bits, a length that does not fit the shape, or a filling that is not zero.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if data.size != packed_size(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {data.size}")
    spread = np.unpackbits(data, bitorder="little")
    if spread[count * bits :].any():
        raise ValueError("the bits behind the last code must be 0")
    rows = spread[: count * bits].reshape(count, bits).astype(np.int64)
    values = (rows << np.arange(bits)).sum(1)
    return np.where(values >= 2 ** (bits - 1), values - 2**bits, values).astype(np.int8).reshape(shape)


def unpack_traced(data: Array | np.ndarray, bits: int, shape: tuple[int, ...]) -> Array:
    """`unpack` as a JAX program, without its checks; float32 codes."""
    count = int(np.prod(shape, dtype=np.int64))
    data = jnp.asarray(data).astype(jnp.int32)
    if bits == 3:  # three bytes hold eight codes
        data = jnp.pad(data, (0, -data.size % 3)).reshape(-1, 3)
        data = data[:, 0] | (data[:, 1] << 8) | (data[:, 2] << 16)
    per_word = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    fields = (data[:, None] >> (bits * jnp.arange(per_word))[None]) & (2**bits - 1)
    codes = fields.reshape(-1)[:count]
    return jnp.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).astype(jnp.float32).reshape(shape)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits={bits} cannot be packed: 2, 3, 4 or 8")
