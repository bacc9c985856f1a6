"""Kernels of a network's layers as whole numbers, for files and programs that hold them in few bits."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from qpde import quantizers
from qpde.models.layers import depthwise_bits, is_depthwise
from qpde.nn.rounding import columns_of, encoded_kernel
from qpde.nn.rules import LayerQuantizers

__all__ = ["Layer", "StoredKernel", "stored_kernels"]


class Layer(NamedTuple):
    """A layer with a kernel, as one call of the network met it.

    Attributes:
      path: Its path.
      settings: What it rounds; None for one that is left alone.
      kernel_shape: Shape of the kernel, None where there are several.
      output_axes: Axes of the kernel that are channels of the output.
      output_shape: Shape of the output.
      macs: Multiply-accumulates of all its calls together.
    """

    path: str
    settings: LayerQuantizers | None
    kernel_shape: tuple[int, ...] | None
    output_axes: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int


class StoredKernel(NamedTuple):
    """A rounded kernel: `values * scale`.

    Attributes:
      values: int8 in the shape of the kernel; float32 where its levels are no multiples of a step, or too many.
      scale: float32, broadcasts to the values.
      bits: Bits of the values, None for float32.
    """

    values: np.ndarray
    scale: np.ndarray
    bits: int | None


def stored_kernels(layer: Layer, params: Any, bits: int) -> dict[str, StoredKernel]:
    """The kernels of a layer by their paths in the parameters.

    Args:
      layer: One that rounds.
      params: Parameters of the network.
      bits: 2 to 15.
    """
    own, path = params, [key for key in layer.path.split("/") if key]
    for key in path:
        own = own[key]
    name = "kernel"
    if layer.kernel_shape is None and len(own) == 1:  # a SymmetricStep's, stacked
        ((stack, own),) = own.items()
        path, name = [*path, stack], "kernel1"
        bits = int(depthwise_bits(bits)) if is_depthwise(own[name].shape[1:]) else bits
    if name not in own or own.get("weight_clips") is None:
        return {}  # a quantizer alone
    assert layer.settings is not None
    kernel, clips = own[name], own["weight_clips"]
    ndim = kernel.ndim - 1 if layer.kernel_shape is None else len(layer.kernel_shape)
    if name == "kernel1" and not layer.settings.per_channel:
        clips = clips[..., 0]
    store = partial(_stored, settings=layer.settings, bits=bits, outputs=layer.output_axes)
    for _ in range(kernel.ndim - ndim):  # stacked by a scan
        store = jax.vmap(store)
    values, scale = jax.device_get(jax.jit(store)(kernel, clips))
    is_whole = values.dtype == np.int8
    return {"/".join([*path, name]): StoredKernel(values, scale, bits if is_whole else None)}


def _stored(kernel, clip, *, settings: LayerQuantizers, bits, outputs):
    if settings.levels == "uniform" and bits <= 8:
        return encoded_kernel(kernel, clip, settings, bits, outputs)
    if settings.standardize:
        kernel = quantizers.standardize_weight(kernel)
    columns, restored = columns_of(kernel, outputs)
    rounded = quantizers.quantize_weight(columns, clip, bits, levels=settings.levels)
    return restored(rounded), jax.numpy.ones((1,) * kernel.ndim)
