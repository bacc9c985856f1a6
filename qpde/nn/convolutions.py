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
    is_depthwise = feature_group_count == lhs.shape[-1] == rhs.shape[-1]
    strides, dilations = set(window_strides), set(rhs_dilation or (1,))
    if (
        lhs.ndim == rhs.ndim == 4
        and lhs.dtype == rhs.dtype == jnp.float32
        and (is_depthwise or feature_group_count == 1)
        and all(isinstance(n, int) for n in lhs.shape[1:3])
        and all(n % 2 == 1 for n in rhs.shape[:2])
        and len(strides) == len(dilations) == 1
        and set(lhs_dilation or (1,)) == {1}
        and precision is None
    ):
        convolve = operators.depthwise if is_depthwise else operators.conv
        options = {"stride": strides.pop(), "dilation": dilations.pop()}
        taps = [options["dilation"] * (n - 1) + 1 for n in rhs.shape[:2]]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:3], taps, window_strides, padding)
        sides = [n for pair in padding for n in pair]
        fits = all(sum(pair) + n >= t for pair, n, t in zip(padding, lhs.shape[1:3], taps, strict=True))
        if fits and min(sides) == max(sides) >= 0:
            return convolve(lhs, rhs, padding=sides[0], **options)
        if fits and min(sides) >= 0:
            return convolve(jnp.pad(lhs, [(0, 0), *padding, (0, 0)]), rhs, padding=0, **options)
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
