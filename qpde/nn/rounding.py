"""Rounding inside a Linen module: clips are parameters beside its kernel, made where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from qpde import quantizers, stencils
from qpde.models.layers import Observe, Quantizer
from qpde.models.options import Smoothing
from qpde.nn.rules import LayerQuantizers

__all__ = ["parameter", "rounded_input", "rounded_kernel", "smoothed"]


def parameter(module: nn.Module, name: str, start: Callable[[], jax.Array], *, temporary: bool = False) -> jax.Array:
    """A parameter of a module, which is made where it is missing and parameters may be made.

    Unlike `module.param` it draws no random numbers, so that the module's other parameters start as they always do.

    Args:
      module: Bound to its variables.
      name: Name of the parameter.
      start: Makes its first value.
      temporary: Take the first value where the parameter is missing and cannot be made.
    Raises:
      ValueError: it is missing.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    if module.is_mutable_collection("params"):
        module.put_variable("params", name, start())
        return module.get_variable("params", name)
    if temporary:
        return start()
    raise ValueError(
        f"{'/'.join(module.path) or 'the layer'} has no {name!r}: these variables are not yet those of a quantized "
        "network. `qpde.models.calibrate_clips(model, variables, x)` makes the clips from data, "
        "`model.adopt(variables, x)` makes their starting values"
    )


def rounded_kernel(
    module: nn.Module,
    kernel: jax.Array,
    settings: LayerQuantizers,
    bits: Any,
    observe: Observe | None = None,
    outputs: tuple[int, ...] = (-1,),
) -> jax.Array:
    """The kernel of a module, rounded, with the clip "weight_clips" beside it.

    Args:
      module: Bound to its variables.
      kernel: Any shape.
      settings: How to round.
      bits: Scalar, traced or not, or None.
      observe: Sees what is rounded, see `qpde.models.layers.Observe`.
      outputs: Axes of the output channels, which have clips of their own where `per_channel` says so.
    """
    if settings.standardize and bits is not None:
        kernel = quantizers.standardize_weight(kernel)
    outputs = tuple(axis % kernel.ndim for axis in outputs)
    order = [axis for axis in range(kernel.ndim) if axis not in outputs] + list(outputs)
    last = kernel.transpose(order)
    columns = last.reshape(*last.shape[: kernel.ndim - len(outputs)], -1)

    def start():
        method = "constant" if settings.standardize else "absmax"
        return quantizers.initial_clip(columns, None, signed=True, method=method, per_channel=settings.per_channel)

    quantizer = Quantizer(True, bits, True, settings.levels)
    rounded = _rounded(module, columns, "weight_clips", quantizer, start, observe)
    return rounded.reshape(last.shape).transpose([order.index(axis) for axis in range(kernel.ndim)])


def rounded_input(
    module: nn.Module,
    x: jax.Array,
    settings: LayerQuantizers,
    bits: Any,
    observe: Observe | None = None,
    *,
    signed: bool,
    call: int = 1,
) -> jax.Array:
    """The input of a module, smoothed and rounded, with the clip "act_clips" beside its kernel.

    Args:
      module: Bound to its variables.
      x: (..., C), floating.
      settings: How to smooth and to round.
      bits: Scalar, traced or not. None: x itself.
      observe: Sees what is rounded.
      signed: Whether x can be negative.
      call: 1 for the module's first call. Later calls have clips of their own, "act2_clips" and so on.
    """
    if settings.smoothing is not None and (bits is not None or module.is_mutable_collection("params")):
        smooth = smoothed(module, x, settings.smoothing)
        x = x if bits is None else smooth
    name = "act_clips" if call == 1 else f"act{call}_clips"
    quantizer = Quantizer(False, bits, signed, settings.levels)
    return _rounded(module, x, name, quantizer, lambda: jnp.float32(quantizers.ACTIVATION_CLIP), observe)


def smoothed(module: nn.Module, x: jax.Array, smoothing: Smoothing, boundary: str = "neumann") -> jax.Array:
    """x after steps of total-variation smoothing.

    A learned step is the parameter "gamma2_share" of the module: the share of the largest stable one, from 0 to 1.
    """
    gamma2: Array | float = smoothing.gamma2
    if smoothing.learned:
        bound = stencils.max_stable_step(eps=smoothing.eps, kind=smoothing.kind)
        gamma2 = bound * parameter(module, "gamma2_share", lambda: jnp.float32(smoothing.gamma2 / bound))
    s = smoothing
    return stencils.smooth(x, steps=s.steps, gamma2=gamma2, eps=s.eps, kind=s.kind, boundary=boundary)


def _rounded(module, x, name, quantizer, start, observe):
    if quantizer.bits is None and observe is None and not module.is_mutable_collection("params"):
        return x
    clip = parameter(module, name, start, temporary=observe is not None or quantizer.bits is None)
    if observe is not None:
        record, clip = observe(x, clip, quantizer)
        if record is not None and module.is_mutable_collection("observed"):
            module.put_variable("observed", name, record)
    if quantizer.is_weight:
        return quantizers.quantize_weight(x, clip, quantizer.bits, levels=quantizer.levels)
    return quantizers.quantize_activation(x, clip, quantizer.bits, levels=quantizer.levels, signed=quantizer.signed)
