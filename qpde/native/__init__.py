"""Convolutions compiled ahead of time for x86 CPUs, where they were built: see kernels.cpp.

`faster` puts a kernel in the place of an operator's own program. That program stays what runs everywhere else: on other
platforms, for other dtypes and unknown sizes, in a program that is split over devices by the compiler, and in one that
is exported, which must run where there are no kernels. A primitive of JAX decides it when a program is lowered.
"""

import ctypes
import math
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["describe", "faster", "materialize"]

SWITCH = "QPDE_NATIVE"
"""Environment variable: the bits of the registers that kernels may use, 512 or 256; 0 leaves the kernels out."""

KERNELS = (
    "conv",
    "conv_adjoint",
    "kernel_gradient",
    "depthwise",
    "depthwise_adjoint",
    "depthwise_kernel_gradient",
)
"""Names of the kernels; qpde_NAME_DTYPE is a symbol of the library, DTYPE one of `DTYPES`."""

MATERIALIZE = "qpde_materialize"
"""Symbol of the call that returns what it is given."""

DTYPES = ("float32", "float64")

_MOST_TAPS = 49
_SETS = {512: "AVX-512", 256: "AVX2"}


def describe() -> str:
    """Who runs convolutions on CPUs, and why: one line for a log."""
    return _library()[1]


def faster(
    name: str, program: Callable[[Any, Array, Array], Array], shape: Callable[[Any, Array, Array], tuple]
) -> Callable[[Any, Array, Array], Array]:
    """A bilinear map of operators.py, by the kernel of that name where it can be.

    Args:
      name: One of `KERNELS`.
      program: (form, a, b) -> result, in JAX. `form` has the static `taps`, `padding`, `stride` and `dilation`.
      shape: The same -> shape of the result.
    Returns:
      A function like the program.
    """
    primitive = Primitive(f"qpde_{name}")
    primitive.def_abstract_eval(lambda a, b, *, form: a.update(shape=shape(form, a, b)))

    def bind(form, a, b):
        return primitive.bind(a, b, form=form)

    jitted = jax.jit(bind, static_argnums=0)

    def alone(a, b, *, form):
        with jax.disable_jit(False):  # a primitive is compiled even where jit is off
            return jitted(form, a, b)

    primitive.def_impl(alone)
    compiled = mlir.lower_fun(lambda a, b, *, form: program(form, a, b), multiple_results=False)

    def lowered(ctx, a, b, *, form):
        if not _calls_kernels(ctx.module_context):
            return compiled(ctx, a, b, form=form)
        padding, stride, dilation = (np.array(n, np.int64) for n in (form.padding, form.stride, form.dilation))
        call = jax.ffi.ffi_lowering(f"{primitive.name}_{ctx.avals_in[0].dtype.name}")
        return call(ctx, a, b, padding=padding, stride=stride[()], dilation=dilation[()])

    def batched(arrays, axes, *, form):
        (a, b), (axis, other) = arrays, axes
        if other is not None or name.endswith("kernel_gradient"):
            return jax.vmap(partial(program, form), axes)(a, b), 0
        a = jnp.moveaxis(a, axis, 0)  # one kernel: all images are one batch
        c = bind(form, a.reshape(-1, *a.shape[2:]), b)
        return c.reshape(*a.shape[:2], *c.shape[1:]), 0

    mlir.register_lowering(primitive, compiled)
    mlir.register_lowering(primitive, lowered, platform="cpu")
    batching.primitive_batchers[primitive] = batched

    def chosen(form, a, b):
        sizes = (*a.shape, *b.shape, *shape(form, a, b))
        takes = a.dtype == b.dtype and a.dtype.name in DTYPES and all(isinstance(n, int) and n > 0 for n in sizes)
        takes = takes and math.prod(form.taps) <= _MOST_TAPS
        return (bind if takes and _library()[0] is not None else program)(form, a, b)

    return chosen


def materialize(x: Array) -> Array:
    """x itself, computed once, and its gradient too.

    XLA's compiler for CPUs fuses what is elementwise into each of its uses. In a chain of steps whose shortcuts are not
    rounded, every step then computes the chain again from its beginning. This call stops the fusion. On other
    platforms, and where there are no kernels, it does nothing.

    Args:
      x: Any array.
    """
    return _materialize.bind(x) if _library()[0] is not None else x


_materialize = Primitive(MATERIALIZE)
_materialize.def_abstract_eval(lambda x: x)
_materialize.def_impl(lambda x: x)
ad.deflinear2(_materialize, lambda cotangent, x: [materialize(cotangent)])
batching.primitive_batchers[_materialize] = lambda arrays, axes: (_materialize.bind(*arrays), *axes)


def _lowered_materialize(ctx: Any, x: Any) -> Any:
    if not _calls_kernels(ctx.module_context):
        return [x]
    return jax.ffi.ffi_lowering(MATERIALIZE, operand_output_aliases={0: 0})(ctx, x)


mlir.register_lowering(_materialize, lambda ctx, x: [x])
mlir.register_lowering(_materialize, _lowered_materialize, platform="cpu")


def _calls_kernels(context: Any) -> bool:
    """Whether a program that is lowered for CPUs may call the library: it runs here, each device by itself."""
    return not context.lowering_parameters.for_export and _is_for_one_device(context.axis_context)


def _is_for_one_device(context: Any) -> bool:
    """Whether a program is lowered for one device: as a whole, or as each device's part in `jax.shard_map`."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    return isinstance(context, mlir.SPMDAxisContext) and context.manual_axes == frozenset(context.mesh.axis_names)


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, if they can be called, and the line that says so. The first call makes them known to XLA."""
    missing = "convolutions on CPUs are the compiler's: "
    most = os.environ.get(SWITCH, "512")
    if most not in ("0", "256", "512"):
        raise ValueError(f"the environment variable {SWITCH} (={most!r}) must be 512, 256 or 0: leave it out for 512")
    if most == "0":
        return None, f"{missing}{SWITCH}=0"
    paths = sorted(Path(__file__).parent.glob("kernels*.so"))
    if not paths:
        return None, f"{missing}native kernels are built where there is a C++ compiler when qpde is installed"
    try:
        library = ctypes.CDLL(str(paths[0]))
        bits = library.qpde_instructions(int(most))
        if bits not in _SETS:
            return None, f"{missing}native kernels need a processor with AVX2"
        for symbol in (MATERIALIZE, *(f"qpde_{name}_{dtype}" for name in KERNELS for dtype in DTYPES)):
            jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:  # of another platform, build or JAX: not used
        return None, f"{missing}native kernels do not load ({error})"
    return library, f"convolutions on CPUs are native kernels ({_SETS[bits]})"
