"""The linear maps of a step x - h K^T s(K x): convolutions K, and their exact adjoints K^T with the same kernel.

Images are (N, H, W, C), kernels (kh, kw, C_in, C_out); depthwise kernels (kh, kw, 1, C). Every pair satisfies
<K x, y> = <x, K^T y> for every stride, padding and dilation, so that a symmetric block stores one kernel.

A convolution is one trilinear form T(x, k, y) = <conv(x, k), y>, and conv, conv_adjoint and the kernel's gradient
are its derivatives in y, x and k. Each is linear in both its arguments and has the other two as its derivatives, which
is all that the custom rules below say. They exist because the compiler's own gradient of the kernel is slow on
CPUs, above all inside `lax.scan` (benchmarks/operators.py); elsewhere the compiler's is used. As with every
`custom_vjp`, reverse mode works to any order and forward mode (`jax.jvp`) does not: J v is the vjp of the vjp.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def conv(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Float[Array, "n h_out w_out c_out"]:
    """Convolution K x (cross-correlation, as everywhere in deep learning).

    y[n, i, j, o] = sum_{a, b, c} x[n, s i + d a - p, s j + d b - p, c] kernel[a, b, c, o], x zero outside, stride s,
    padding p, dilation d.

    Args:
      x: images.   kernel: kh and kw odd.
      stride: 1 or more.   dilation: distance of the kernel's taps, 1 or more.
      padding: zeros on each side of both axes; None is d (k - 1) / 2 on each axis, which keeps the size at stride 1
        and equals the usual padding=1 of a 3x3 kernel at stride 2 (XLA's "SAME" differs there).
    Returns:
      Images of height (h + 2 p - d (kh - 1) - 1) // s + 1, likewise the width, in x's dtype.
    Raises:
      ValueError: an even kernel, a stride, padding or dilation out of range, or a kernel larger than the padded image.
    """
    form = _form(x.shape[1:3], kernel, stride, padding, dilation)
    return _conv(form, x, kernel)


def conv_adjoint(
    y: Float[Array, "n h_out w_out c_out"],
    kernel: Float[Array, "kh kw c_in c_out"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    size: tuple[int, int] | None = None,
) -> Float[Array, "n h w c_in"]:
    """Adjoint K^T y of `conv` with the same kernel and options: <conv(x), y> = <x, conv_adjoint(y)> for all x, y.

    At stride 1 it is the convolution with the flipped, channel-swapped kernel and padding d (k - 1) - p; at a larger
    stride, that of y with s - 1 zeros between its pixels.

    Args:
      y: images in the range of `conv`.   kernel, stride, padding, dilation: as given to `conv`.
      size: height and width of x. At stride 1 it follows from y; at a larger stride several sizes share one y and it
        must be given.
    Returns:
      Images of that size, in y's dtype.
    Raises:
      ValueError: as `conv`; a missing `size` at a stride above 1; a `size` that `conv` does not map to y's.
    """
    form = _adjoint_form(y.shape[1:3], kernel, stride, padding, dilation, size)
    return _conv_adjoint(form, y, kernel)


def depthwise(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
) -> Float[Array, "n h_out w_out c"]:
    """Depthwise convolution: every channel with a kernel of its own, as a sum of shifted products.

    y[n, i, j, c] = sum_{a, b} x[n, s i + d a - p, s j + d b - p, c] kernel[a, b, 0, c], the products of one pass over x.

    Args, Returns, Raises: as `conv`.
    """
    form = _form(x.shape[1:3], kernel, stride, padding, dilation)
    return _depthwise(form, x, kernel)


def depthwise_adjoint(
    y: Float[Array, "n h_out w_out c"],
    kernel: Float[Array, "kh kw 1 c"],
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    size: tuple[int, int] | None = None,
) -> Float[Array, "n h w c"]:
    """Adjoint of `depthwise` with the same kernel and options; arguments as `conv_adjoint`.

    With padding=0 it is the full correlation: the image grows back to the size that `depthwise` shrank.
    """
    form = _adjoint_form(y.shape[1:3], kernel, stride, padding, dilation, size)
    return _depthwise_adjoint(form, y, kernel)


class _Form(NamedTuple):
    """What is static of T(x, k, y): the sizes of x, y and the kernel, and how the kernel steps over x."""

    size: tuple[int, int]
    size_out: tuple[int, int]
    taps: tuple[int, int]
    padding: tuple[int, int]
    stride: int
    dilation: int

    @property
    def reach(self) -> tuple[int, int]:
        """Distance from the kernel's first tap to its last."""
        return tuple(self.dilation * (k - 1) for k in self.taps)

    @property
    def conv_padding(self) -> list[tuple[int, int]]:
        """Low and high padding of x per axis; a negative one crops what the last stride does not reach."""
        used = [self.stride * (m - 1) + r + 1 for m, r in zip(self.size_out, self.reach, strict=True)]
        return [(p, u - n - p) for p, u, n in zip(self.padding, used, self.size, strict=True)]

    @property
    def adjoint_padding(self) -> list[tuple[int, int]]:
        """Low and high padding per axis of y, spread out by the stride."""
        return [(r - low, r - high) for r, (low, high) in zip(self.reach, self.conv_padding, strict=True)]


def _form(size, kernel, stride, padding, dilation) -> _Form:
    taps = kernel.shape[:2]
    if any(k % 2 == 0 for k in taps):
        raise ValueError(f"`kernel` has even size {taps}; use odd sizes (pad the kernel with a row or column of zeros)")
    if stride < 1 or dilation < 1:
        raise ValueError(f"`stride` (={stride}) and `dilation` (={dilation}) must be at least 1")
    if padding is not None and padding < 0:
        raise ValueError(f"`padding` (={padding}) must be at least 0; crop the image instead")
    reach = tuple(dilation * (k - 1) for k in taps)
    pads = tuple(r // 2 if padding is None else padding for r in reach)
    if any(n + 2 * p <= r for n, p, r in zip(size, pads, reach, strict=True)):
        raise ValueError(
            f"the kernel spans {tuple(r + 1 for r in reach)} pixels, more than the image of {tuple(size)} padded by "
            f"{pads}; use a larger image or more `padding`"
        )
    size_out = tuple((n + 2 * p - r - 1) // stride + 1 for n, p, r in zip(size, pads, reach, strict=True))
    return _Form(tuple(size), size_out, taps, pads, stride, dilation)


def _adjoint_form(size_out, kernel, stride, padding, dilation, size) -> _Form:
    if size is None:
        if stride != 1:
            raise ValueError(f"`stride` (={stride}) above 1 needs `size`, the height and width of conv's input")
        reach = [dilation * (k - 1) for k in kernel.shape[:2]]
        size = [m + r - 2 * (r // 2 if padding is None else padding) for m, r in zip(size_out, reach, strict=True)]
    form = _form(size, kernel, stride, padding, dilation)
    if form.size_out != tuple(size_out):
        raise ValueError(f"`size` (={tuple(size)}) is mapped to {form.size_out} by conv, but y has {tuple(size_out)}")
    return form


def _trilinear(conv, adjoint, kernel_gradient):
    """Ties three maps (form, a, b) -> c of one trilinear form together: each is the derivative of the other two."""
    # jit: called eagerly, each compiles once per form and shape rather than operation by operation.
    conv, adjoint, kernel_gradient = (
        jax.custom_vjp(jax.jit(f, static_argnums=0, inline=True), nondiff_argnums=(0,))
        for f in (conv, adjoint, kernel_gradient)
    )

    def linear(f, gradient_a, gradient_b):
        def forward(form, a, b):
            return f(form, a, b), (a, b)

        def backward(form, residuals, c):
            return gradient_a(form, *residuals, c), gradient_b(form, *residuals, c)

        f.defvjp(forward, backward)

    linear(conv, lambda form, x, k, y: adjoint(form, y, k), lambda form, x, k, y: kernel_gradient(form, x, y))
    linear(adjoint, lambda form, y, k, x: conv(form, x, k), lambda form, y, k, x: kernel_gradient(form, x, y))
    linear(kernel_gradient, lambda form, x, y, k: adjoint(form, y, k), lambda form, x, y, k: conv(form, x, k))
    return conv, adjoint, kernel_gradient


def _full_conv(form, x, kernel):
    return _correlate(x, kernel, form.conv_padding, stride=form.stride, dilation=form.dilation)


def _full_adjoint(form, y, kernel):
    flipped = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    return _correlate(y, flipped, form.adjoint_padding, spread=form.stride, dilation=form.dilation)


def _full_kernel_gradient(form, x, y):
    return lax.platform_dependent(
        x, y, cpu=partial(_kernel_gradient_by_dots, form), default=partial(_kernel_gradient_by_conv, form)
    )


def _correlate(x, kernel, padding, *, stride=1, spread=1, dilation=1):
    """The compiler's convolution; on CPUs, where its product is too narrow, several output pixels at a time."""
    taps, c_in, c_out = kernel.shape[1], *kernel.shape[2:]
    width = x.shape[2] + sum(padding[1]) - taps + 1
    pixels = next(q for q in (4, 2, 1) if q * c_out <= 32 and width % q == 0) if c_out < 32 else 1

    def plain(x, kernel, step=1):
        y = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, step * stride),
            padding=padding,
            lhs_dilation=(spread, spread),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )
        return y.astype(x.dtype)

    def several_pixels(x, kernel):
        """Neighbours along W share one patch: the kernel shifted to each of them stands beside itself."""
        missing = -c_in % 4  # the compiler reads patches by vectors of 4 channels, others one by one
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, missing)])
        kernel = jnp.pad(kernel, [(0, 0)] * 2 + [(0, missing), (0, 0)])
        shifted = [jnp.pad(kernel, [(0, 0), (i, pixels - 1 - i), (0, 0), (0, 0)]) for i in range(pixels)]
        y = plain(x, jnp.concatenate(shifted, axis=-1), step=pixels)
        return y.reshape(*y.shape[:2], width, c_out)

    if pixels == 1 or taps == 1 or (stride, spread, dilation) != (1, 1, 1):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=several_pixels, default=plain)


def _kernel_gradient_by_conv(form, x, y):
    """The compiler's own: channels act as the batch, the batch as the channels, y as the kernel."""
    kernel = lax.conv_general_dilated(
        x,
        y,
        window_strides=(form.dilation,) * 2,
        padding=form.conv_padding,
        rhs_dilation=(form.stride,) * 2,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )
    return kernel.astype(x.dtype)


def _kernel_gradient_by_dots(form, x, y):
    """One matrix product over the pixels of a few images at a time, as many as stay in cache.

    The taps stand side by side as columns, so that the product is wide enough for the core: at stride 1 those along H
    in x and those along W in y (6 copies for 9 taps), else all in x, which meets few of its pixels per tap.
    """
    kh, kw = form.taps
    c_in, c_out = x.shape[-1], y.shape[-1]
    columns = (kh * c_in + kw * c_out) if form.stride == 1 else (kh * kw * c_in + c_out)
    pixels = max(512, 200_000 // columns)
    images = max(1, pixels // (form.size_out[0] * form.size_out[1]))
    images = next(i for i in range(min(images, len(x)), 0, -1) if len(x) % i == 0)

    def product(x, y):
        if form.stride == 1:
            x = jnp.concatenate(list(_windows(_pad(x, form.conv_padding[0], (0, 0)), (kh, 1), (form.size_out[0], form.size[1]), 1, form.dilation)), axis=-1)
            y = jnp.concatenate(list(_windows(_pad(y, (0, 0), form.adjoint_padding[1]), (1, kw), (form.size_out[0], form.size[1]), 1, form.dilation))[::-1], axis=-1)
        else:
            x = jnp.concatenate(list(_shifts(form, x)), axis=-1)
        return lax.dot_general(
            x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    blocks = [a.reshape(-1, images, *a.shape[1:]) for a in (x, y)]
    start = jnp.zeros((kh * c_in * (1 if form.stride == 1 else kw), kw * c_out if form.stride == 1 else c_out))
    total = lax.scan(lambda total, block: (total + product(*block), None), start, blocks)[0]
    split = total.reshape(kh, -1, c_in, kw if form.stride == 1 else 1, c_out)
    return split.swapaxes(2, 3).reshape(kh, kw, c_in, c_out).astype(x.dtype)


def _pad(x, high_low_h, high_low_w, interior=0):
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (*high_low_h, interior), (*high_low_w, interior), (0, 0, 0)])


def _shifts(form, x):
    """The pixels of x that each tap of the kernel meets, tap by tap."""
    return _windows(_pad(x, *form.conv_padding), form.taps, form.size_out, form.stride, form.dilation)


def _windows(x, taps, size, stride, dilation):
    n, _, _, c = x.shape
    for a in range(taps[0]):
        for b in range(taps[1]):
            i, j = a * dilation, b * dilation
            end = (n, i + stride * (size[0] - 1) + 1, j + stride * (size[1] - 1) + 1, c)
            yield lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))


def _depthwise_conv(form, x, kernel):
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    return sum(s * w for s, w in zip(_shifts(form, x), weights, strict=True))


def _depthwise_transpose(form, y, kernel):
    y = _pad(y, *form.adjoint_padding, form.stride - 1)
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])[::-1]
    return sum(s * w for s, w in zip(_windows(y, form.taps, form.size, 1, form.dilation), weights, strict=True))


def _depthwise_kernel_gradient(form, x, y):
    taps = [jnp.sum(s * y, axis=(0, 1, 2), dtype=jnp.float32) for s in _shifts(form, x)]
    return jnp.stack(taps).reshape(*form.taps, 1, x.shape[-1]).astype(x.dtype)


_conv, _conv_adjoint, _ = _trilinear(_full_conv, _full_adjoint, _full_kernel_gradient)
_depthwise, _depthwise_adjoint, _ = _trilinear(_depthwise_conv, _depthwise_transpose, _depthwise_kernel_gradient)
