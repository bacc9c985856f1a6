"""The convolutions of `flax.linen.Conv`, by `qpde.operators` where these have the form: fast on CPUs."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from qpde import operators

__all__ = ["conv_general_dilated"]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> Array:
    """`jax.lax.conv_general_dilated` as `flax.linen.Conv` calls it, channels last.

    Images (N, H, W, C) under odd kernels, of one group or depthwise, are convolved by `qpde.operators`, which forward
    mode does not differentiate. Anything else is left to the compiler.

    Args:
      lhs: The input.
      rhs: The kernel.
      window_strides: By axis, as all that follows.
      padding: "SAME", "VALID", or low and high padding.
      lhs_dilation: Of the input.
      rhs_dilation: Of the kernel.
      dimension_numbers: Where the axes are.
      feature_group_count: Groups of channels.
      precision: Of the compiler's products.
    """
    stride, dilation = set(window_strides), set(rhs_dilation or (1,))
    is_depthwise = feature_group_count == lhs.shape[-1] == rhs.shape[-1]
    has_form = (
        (is_depthwise or feature_group_count == 1)
        and lhs.ndim == rhs.ndim == 4
        and lhs.dtype == rhs.dtype == jnp.float32
        and all(isinstance(n, int) for n in lhs.shape[1:3])
        and all(n % 2 == 1 for n in rhs.shape[:2])
        and len(stride) == len(dilation) == 1
        and set(lhs_dilation or (1,)) == {1}
        and precision is None
    )
    if has_form:
        (step,), (spread,) = stride, dilation
        taps = [spread * (n - 1) + 1 for n in rhs.shape[:2]]
        pads = (
            lax.padtype_to_pads(lhs.shape[1:3], taps, window_strides, padding) if isinstance(padding, str) else padding
        )
        padded = [n + low + high for n, (low, high) in zip(lhs.shape[1:3], pads, strict=True)]
        sides = {n for pair in pads for n in pair}
        if min(sides) >= 0 and all(n >= t for n, t in zip(padded, taps, strict=True)):
            if len(sides) > 1:
                lhs, sides = jnp.pad(lhs, [(0, 0), *pads, (0, 0)]), {0}
            convolve = operators.depthwise if is_depthwise else operators.conv
            return convolve(lhs, rhs, stride=step, padding=sides.pop(), dilation=spread)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )
