"""The linear maps of a step x - h K^T s(K x): convolutions K and their exact adjoints K^T, with one kernel.

Images are (N, H, W, C), kernels (kh, kw, C_in, C_out); depthwise kernels (kh, kw, 1, C). Every pair satisfies
<K x, y> = <x, K^T y> for every stride, padding and dilation, so a symmetric block stores one kernel.

A convolution is one trilinear form T(x, k, y) = <conv(x, k), y>; conv, conv_adjoint and the kernel's gradient are its
derivatives in y, x and k. Each of the three is bilinear, and its own derivatives are the other two: that is all the
custom rules below say. They exist because the compiler's own kernel gradient is slow on CPUs, above all inside
`lax.scan` (benchmarks/operators.py). What is written for CPUs is chosen when a function is lowered for one, by
`lax.platform_dependent`, or by `qpde.native` where its kernels are built; other platforms get the compiler's
convolutions. As with every `custom_vjp`, reverse mode
works to any order and forward mode (`jax.jvp`) does not: J v is the vjp of the vjp.
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from qpde import native
from qpde.checks import whole_number
from qpde.devices import by_compiler, on_each_device, vary_alike

__all__ = ["conv", "conv_adjoint", "depthwise", "depthwise_adjoint"]


def conv(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolution K x (cross-correlation, as everywhere in deep learning).

    y[n, i, j, o] = sum_{a, b, c} x[n, s i + d a - p, s j + d b - p, c] kernel[a, b, c, o], with x zero outside,
    stride s, padding p and dilation d. Products are those of the kernel's dtype: a bfloat16 kernel rounds x, and y, to
    bfloat16 too. Sums are kept in float32 whatever it is.

    Args:
      x: Images.
      kernel: Kernel of odd height and width.
      stride: Distance of the outputs, 1 or more.
      padding: Zeros on each side of both axes, 0 or more. None is d (k - 1) / 2 on each axis, which keeps the size
        at stride 1 and is the usual padding=1 of a 3x3 kernel at stride 2 (XLA's "SAME" differs there).
      dilation: Distance of the kernel's taps, 1 or more.
    Returns:
      Images of height (h + 2 p - d (kh - 1) - 1) // s + 1, likewise the width, in x's dtype.
    Raises:
      ValueError: Images or a kernel that are not floating; an even kernel; a stride, padding or dilation out of range;
        a kernel larger than the padded image.
    """
    form = _form(x.shape[1:3], kernel, stride, padding, dilation)
    return _in_kernel_dtype(_conv, form, x, kernel)


def conv_adjoint(
    y: Float[Array, "n h_out w_out c_out"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    size: tuple[int, int] | None = None,
) -> Float[Array, "n h w c_in"]:
    """Adjoint K^T y of `conv` with the same kernel and options: <conv(x), y> = <x, conv_adjoint(y)>.

    At stride 1 it is the convolution with the flipped, channel-swapped kernel and padding d (k - 1) - p; at a larger
    stride, that of y with s - 1 zeros between its pixels.

    Args:
      y: Images in the range of `conv`.
      kernel: As given to `conv`.
      stride: As given to `conv`.
      padding: As given to `conv`.
      dilation: As given to `conv`.
      size: Height and width of x. At stride 1 it follows from y's; at a larger stride several sizes of x share one
        of y, and it must be given.
    Returns:
      Images of that size, in y's dtype.
    Raises:
      ValueError: As `conv`; a missing `size` at a stride above 1; a `size` that `conv` does not map to y's.
    """
    form = _adjoint_form(y.shape[1:3], kernel, stride, padding, dilation, size)
    return _in_kernel_dtype(_conv_adjoint, form, y, kernel)


def depthwise(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Float[Array, "n h_out w_out c"]:
    """Depthwise convolution: every channel with a kernel of its own, as a sum of shifted products.

    y[n, i, j, c] = sum_{a, b} x[n, s i + d a - p, s j + d b - p, c] kernel[a, b, 0, c], all taps in one pass over x.

    Args:
      x: Images.
      kernel: One kernel for each channel, of odd height and width.
      stride: Distance of the outputs, 1 or more.
      padding: Zeros on each side, see `conv`.
      dilation: Distance of the kernel's taps, 1 or more.
    Returns:
      Images of the size that `conv` gives, in x's dtype.
    Raises:
      ValueError: As `conv`, or a kernel that is not one for each channel of x.
    """
    _check_depthwise(x, kernel)
    form = _form(x.shape[1:3], kernel, stride, padding, dilation)
    return _in_kernel_dtype(_depthwise, form, x, kernel)


def depthwise_adjoint(
    y: Float[Array, "n h_out w_out c"],
    kernel: Float[Array, "kh kw 1 c"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    size: tuple[int, int] | None = None,
) -> Float[Array, "n h w c"]:
    """Adjoint of `depthwise` with the same kernel and options.

    With padding=0 it is the full correlation: the image grows back to the size that `depthwise` shrank.

    Args:
      y: Images as `depthwise` returns them.
      kernel: As for `depthwise`.
      stride: As for `depthwise`.
      padding: As for `depthwise`.
      dilation: As for `depthwise`.
      size: Height and width of the result, see `conv_adjoint`.
    Raises:
      ValueError: As `conv_adjoint`, or a kernel that is not one for each channel of y.
    """
    _check_depthwise(y, kernel)
    form = _adjoint_form(y.shape[1:3], kernel, stride, padding, dilation, size)
    return _in_kernel_dtype(_depthwise_adjoint, form, y, kernel)


def _check_depthwise(x, kernel):
    if kernel.shape[2:] != (1, x.shape[-1]):
        raise ValueError(
            f"`kernel` has shape {kernel.shape}; a depthwise one for images of {x.shape[-1]} channels is "
            f"(kh, kw, 1, {x.shape[-1]}): use conv to mix channels"
        )


def _in_kernel_dtype(f, form, x, kernel):
    """Cast outside the custom rules, so that the narrow x is what the backward pass keeps."""
    for name, dtype in (("images", x.dtype), ("kernel", kernel.dtype)):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name} of dtype {dtype} must be floating: convert by .astype(jnp.float32)")
    images, kernel = vary_alike(on_each_device(x, batch=True), on_each_device(kernel))
    return f(form, images.astype(kernel.dtype), kernel).astype(x.dtype)


Size: TypeAlias = Any
"""A number of pixels: an int, or an expression of symbols while a program is exported for every size."""


class _Form(NamedTuple):
    """What is static of T(x, k, y): the sizes of x, y and the kernel, and how the kernel steps over x."""

    size: tuple[Size, Size]
    size_out: tuple[Size, Size]
    taps: tuple[int, int]
    padding: tuple[int, int]
    stride: int
    dilation: int

    @property
    def reach(self) -> tuple[int, int]:
        """Distance from the kernel's first tap to its last."""
        return _reach(self.taps, self.dilation)

    @property
    def conv_padding(self) -> list[tuple[Size, Size]]:
        """Low and high padding of x per axis; a negative one crops what the last stride does not reach."""
        used = [self.stride * (m - 1) + r + 1 for m, r in zip(self.size_out, self.reach, strict=True)]
        return [(p, u - n - p) for p, u, n in zip(self.padding, used, self.size, strict=True)]

    @property
    def adjoint_padding(self) -> list[tuple[Size, Size]]:
        """Low and high padding per axis of y, spread out by the stride."""
        return [(r - low, r - high) for r, (low, high) in zip(self.reach, self.conv_padding, strict=True)]


def _reach(taps, dilation):
    return tuple(dilation * (k - 1) for k in taps)


def _form(size, kernel, stride, padding, dilation) -> _Form:
    taps = kernel.shape[:2]
    if any(k % 2 == 0 for k in taps):
        raise ValueError(f"`kernel` has even size {taps}; odd sizes are needed, pad it with a row or column of zeros")
    stride, dilation = whole_number("stride", stride, least=1), whole_number("dilation", dilation, least=1)
    padding = None if padding is None else whole_number("padding", padding, least=0)
    reach = _reach(taps, dilation)
    pads = tuple(r // 2 if padding is None else padding for r in reach)
    if any(n + 2 * p <= r for n, p, r in zip(size, pads, reach, strict=True)):
        raise ValueError(
            f"the kernel spans {tuple(r + 1 for r in reach)} pixels, more than the image of {tuple(size)} padded "
            f"by {pads}; use a larger image or more `padding`"
        )
    size_out = tuple((n + 2 * p - r - 1) // stride + 1 for n, p, r in zip(size, pads, reach, strict=True))
    return _Form(tuple(size), size_out, taps, pads, stride, dilation)


def _adjoint_form(size_out, kernel, stride, padding, dilation, size) -> _Form:
    if size is None:
        if stride != 1:
            raise ValueError(f"`stride` (={stride}) above 1 needs `size`, height and width of the adjoint's result")
        reach = _reach(kernel.shape[:2], dilation)
        size = [m + r - 2 * (r // 2 if padding is None else padding) for m, r in zip(size_out, reach, strict=True)]
    form = _form(size, kernel, stride, padding, dilation)
    if form.size_out != tuple(size_out):
        raise ValueError(f"`size` (={tuple(size)}) is mapped to {form.size_out} by conv, but y has {tuple(size_out)}")
    return form


def _trilinear(conv, adjoint, kernel_gradient):
    """Ties three maps (form, a, b) -> c of one trilinear form together: each is the derivative of the others."""

    def compiled(f, *, like):
        # jit: called eagerly, each compiles once per form and shape rather than operation by operation.
        def on_any_mesh(form, a, b):
            return by_compiler(partial(f, form), like=like)(a, b)

        return jax.custom_vjp(jax.jit(on_any_mesh, static_argnums=0, inline=True), nondiff_argnums=(0,))

    conv, adjoint = compiled(conv, like=0), compiled(adjoint, like=0)
    kernel_gradient = compiled(kernel_gradient, like=None)

    def bilinear(f, gradients):
        f.defvjp(lambda form, a, b: (f(form, a, b), (a, b)), lambda form, ab, c: gradients(form, *ab, c))

    bilinear(conv, lambda form, x, k, y: (adjoint(form, y, k), kernel_gradient(form, x, y)))
    bilinear(adjoint, lambda form, y, k, x: (conv(form, x, k), kernel_gradient(form, x, y)))
    bilinear(kernel_gradient, lambda form, x, y, k: (adjoint(form, y, k), conv(form, x, k)))
    return conv, adjoint


def _full_conv(form, x, kernel):
    # Not `conv_padding`: what it crops does not change the sums, and where sizes are symbols it is one too.
    return _correlate(x, kernel, [(p, p) for p in form.padding], stride=form.stride, dilation=form.dilation)


def _full_adjoint(form, y, kernel):
    flipped = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    return _correlate(y, flipped, form.adjoint_padding, spread=form.stride, dilation=form.dilation)


def _full_kernel_gradient(form, x, y):
    by_dots, by_conv = partial(_kernel_gradient_by_dots, form), partial(_kernel_gradient_by_conv, form)
    return lax.platform_dependent(x, y, cpu=by_dots, default=by_conv)


def _correlate(x, kernel, padding, *, stride=1, spread=1, dilation=1):
    """The compiler's convolution; on CPUs, by JAX 0.10, several output pixels at a time where its product is narrow."""
    x, padding, spread = _numeric(x, padding, spread)
    taps, c_in, c_out = kernel.shape[1:]
    width = x.shape[2] + sum(padding[1]) - taps + 1
    pixels = next((q for q in (4, 2) if q * c_out <= 32 and width % q == 0), 1)

    def plain(x, kernel, pixels=1):
        y = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, pixels * stride),
            padding=padding,
            lhs_dilation=(spread, spread),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=_wide(x),
        )
        return y.astype(x.dtype)

    def several_pixels(x, kernel):
        """Neighbours along W share a patch: the kernel, shifted to each of them, stands beside itself."""
        missing = -c_in % 4  # patches of 4, 8, ... channels are gathered by vectors, others one by one
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, missing)])
        shifted = [jnp.pad(kernel, [(0, 0), (i, pixels - 1 - i), (0, missing), (0, 0)]) for i in range(pixels)]
        y = plain(x, jnp.concatenate(shifted, axis=-1), pixels)
        return y.reshape(*y.shape[:2], width, c_out)

    # By JAX 0.12 a training step without native kernels takes half as long again with several pixels as with one.
    if jax.__version_info__ >= (0, 11) or pixels == 1 or taps == 1 or (stride, spread, dilation) != (1, 1, 1):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=several_pixels, default=plain)


def _kernel_gradient_by_conv(form, x, y):
    """The compiler's own: channels act as the batch, the batch as the channels, y as the kernel."""
    x, padding, _ = _numeric(x, form.conv_padding)
    kernel = lax.conv_general_dilated(
        x,
        y,
        window_strides=(form.dilation,) * 2,
        padding=padding,
        rhs_dilation=(form.stride,) * 2,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=_wide(x),
    )
    return kernel.astype(x.dtype)


def _kernel_gradient_by_dots(form, x, y):
    """Matrix products over the pixels of a few images at a time.

    The taps stand side by side as columns, so that the products are wide: at stride 1 the taps along H in x and
    those along W in y, 6 copies for 9 taps; else all in x, of which each tap then meets only a part.
    """
    (kh, kw), c_in, c_out = form.taps, x.shape[-1], y.shape[-1]
    split = form.stride == 1
    columns_x, columns_y = (kh * c_in, kw * c_out) if split else (kh * kw * c_in, c_out)

    def product(x, y):
        if split:
            rows, size = form.conv_padding[0], (form.size_out[0], form.size[1])
            x = _windows(_pad(x, [rows, (0, 0)]), (kh, 1), size, dilation=form.dilation)
            y = _windows(_pad(y, [(0, 0), form.adjoint_padding[1]]), (1, kw), size, dilation=form.dilation)[::-1]
        else:
            x, y = _shifts(form, x), [y]
        x, y = (_rows(jnp.concatenate(a, axis=-1)) for a in (x, y))
        return lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=_wide(x))

    total = _sum_over_blocks(product, x, y, pixels=max(512, 200_000 // max(1, columns_x + columns_y)))
    by_tap = total.reshape(kh, 1 if split else kw, c_in, kw if split else 1, c_out).swapaxes(2, 3)
    return by_tap.reshape(kh, kw, c_in, c_out).astype(x.dtype)


def _sum_over_blocks(f, x, y, *, pixels):
    """Sum of f over blocks of images with about so many output pixels, few enough to stay in the core's cache."""
    blocks = [_blocks(a, numbers=pixels, of_image=y.shape[1] * y.shape[2]) for a in (x, y)]
    total = jax.eval_shape(f, *(jax.ShapeDtypeStruct(b.shape[1:], b.dtype) for b in blocks))
    (start,) = vary_alike(jnp.zeros(total.shape, total.dtype), like=blocks)
    return lax.scan(lambda total, block: (total + f(*block), None), start, blocks)[0]


_BLOCK = 2**19
"""Numbers in a block of images that a CPU takes at a time."""


def _images_of_block(count, *, numbers, of_image):
    """Images of a block with at most so many numbers, but one at least, so that all blocks are alike.

    Where a program is exported for sizes that are symbols, every image is a block.
    """
    if not (isinstance(count, int) and isinstance(of_image, int)):
        return 1
    limit = min(max(1, numbers // max(1, of_image)), count)
    return next((i for i in range(limit, 0, -1) if count % i == 0), 1)


def _blocks(x, *, numbers, of_image):
    """(N, ...) as (blocks, images, ...)."""
    images = _images_of_block(x.shape[0], numbers=numbers, of_image=of_image)
    return x.reshape(x.shape[0] // images, images, *x.shape[1:])


def _depthwise_conv(form, x, kernel):
    return _sum_of_products(partial(_shifts, form), x, kernel)


def _depthwise_transpose(form, y, kernel):
    def windows(y):
        y = _pad(y, form.adjoint_padding, between=form.stride - 1)
        return _windows(y, form.taps, form.size, dilation=form.dilation)[::-1]

    return _sum_of_products(windows, y, kernel)


def _sum_of_products(windows, x, kernel):
    """Sum over the taps of what each of them meets, `windows(x)`, times its weights.

    On CPUs a few images at a time: they stay in the cache, and what made the kernel, its rounding for instance,
    stays outside of the loop over pixels, into which the compiler would pull it for every pixel and tap.
    """
    wide = _wide(kernel)

    def at_once(x, kernel):
        weights = kernel.astype(wide).reshape(math.prod(kernel.shape[:2]), 1, 1, 1, kernel.shape[-1])
        return sum(x.astype(wide) * k for x, k in zip(windows(x), weights, strict=True)).astype(kernel.dtype)

    def by_blocks(x, kernel):
        images = _images_of_block(x.shape[0], numbers=_BLOCK, of_image=math.prod(x.shape[1:]))
        block = jax.eval_shape(at_once, jax.ShapeDtypeStruct((images, *x.shape[1:]), x.dtype), kernel)
        (start,) = vary_alike(jnp.zeros((x.shape[0], *block.shape[1:]), block.dtype), like=[x])

        if x.shape[0] == 0:
            return start

        def placed(i, y):  # into the result itself: a scan would put blocks together by a copy
            part = at_once(lax.dynamic_slice_in_dim(x, i * images, images), kernel)
            return lax.dynamic_update_slice_in_dim(y, part, i * images, axis=0)

        return lax.fori_loop(0, x.shape[0] // images, placed, start)

    return lax.platform_dependent(x, kernel, cpu=by_blocks, default=at_once)


def _depthwise_kernel_gradient(form, x, y):
    c, wide = x.shape[-1], _wide(x)

    def products(x, y):
        return [s.astype(wide) * y.astype(wide) for s in _shifts(form, x)]

    def by_sums(x, y):
        return jnp.stack([jnp.sum(p, axis=(0, 1, 2)) for p in products(x, y)])

    def by_dots(x, y):
        # A product with ones is the one sum over pixels that the compiler does at the speed of the cache.
        ones = jnp.ones((1, math.prod(y.shape[:-1])), wide)
        return jnp.concatenate([ones @ _rows(p) for p in products(x, y)])

    def by_blocks(x, y):
        return _sum_over_blocks(by_dots, x, y, pixels=400_000 // max(1, c))

    kernel = lax.platform_dependent(x, y, cpu=by_blocks, default=by_sums)
    return kernel.reshape(*form.taps, 1, c).astype(x.dtype)


def _shifts(form, x):
    """The pixels of x that each tap of the kernel meets, tap by tap."""
    return _windows(_pad(x, form.conv_padding), form.taps, form.size_out, form.stride, form.dilation)


def _rows(x):
    """(..., C) as (pixels, C)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _windows(x, taps, size, stride=1, dilation=1):
    """For each tap the pixels of x it meets, `size` of them, when the first tap starts in the corner."""
    windows = []
    for i, j in np.ndindex(*taps):
        start = (dilation * i, dilation * j)
        stop = [s + stride * (m - 1) + 1 for s, m in zip(start, size, strict=True)]
        windows.append(lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[3]), (1, stride, stride, 1)))
    return windows


def _numeric(x, padding, spread=1):
    """The same with numbers as the compiler's convolution needs them: symbols pad x beforehand."""
    if all(isinstance(p, int) for both in padding for p in both):
        return x, padding, spread
    return _pad(x, padding, between=spread - 1), [(0, 0)] * 2, 1


def _pad(x, padding, between=0):
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, between) for p in padding), (0, 0, 0)])


def _wide(x):
    """The dtype of sums: float32 at least."""
    return x.dtype if x.dtype.itemsize > 4 else jnp.float32


_conv, _conv_adjoint = _trilinear(
    native.faster("conv", _full_conv, lambda form, x, k: (x.shape[0], *form.size_out, k.shape[3])),
    native.faster("conv_adjoint", _full_adjoint, lambda form, y, k: (y.shape[0], *form.size, k.shape[2])),
    native.faster("kernel_gradient", _full_kernel_gradient, lambda form, x, y: (*form.taps, x.shape[3], y.shape[3])),
)
_depthwise, _depthwise_adjoint = _trilinear(
    native.faster("depthwise", _depthwise_conv, lambda form, x, k: (x.shape[0], *form.size_out, k.shape[3])),
    native.faster("depthwise_adjoint", _depthwise_transpose, lambda form, y, k: (y.shape[0], *form.size, k.shape[3])),
    native.faster(
        "depthwise_kernel_gradient", _depthwise_kernel_gradient, lambda form, x, y: (*form.taps, 1, y.shape[3])
    ),
)
