"""Convolutions and their adjoints: values, exact adjointness, gradients of every order, and where they run."""

from functools import partial
from inspect import unwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from qpde import operators
from qpde.operators import conv, conv_adjoint, depthwise, depthwise_adjoint
from qpde.testing import check_adjoint


class Case(NamedTuple):
    """One way to step a kernel over an image."""

    size: tuple[int, int] = (8, 8)
    taps: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int | None = None
    dilation: int = 1

    @property
    def options(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def pads(self):
        return [(self.dilation * (k - 1) // 2 if self.padding is None else self.padding,) * 2 for k in self.taps]


CASES = [
    Case(),
    Case(size=(7, 9), padding=0),
    Case(stride=2),
    Case(size=(9, 7), stride=2),
    Case(taps=(1, 1), stride=2),
    Case(size=(5, 6), taps=(1, 1), padding=1),
    Case(size=(9, 11), dilation=2),
    Case(size=(10, 9), taps=(5, 3), stride=3, padding=3, dilation=2),
    Case(size=(6, 7), padding=4),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
kinds = pytest.mark.parametrize("kind", ["full", "depthwise"])


@st.composite
def any_case(draw):
    """A stride, dilation, kernel and padding, and an image large enough for them."""
    taps = draw(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])))
    dilation, stride = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    padding = draw(st.none() | st.integers(0, 3))
    least = [dilation * (k - 1) + 1 - 2 * (padding or 0) for k in taps]
    size = tuple(draw(st.integers(max(1, low), max(1, low) + 5)) for low in least)
    return Case(size, taps, stride, padding, dilation)


def operands(case, kind, seed=0, dtype=jnp.float32, channels=(3, 5)):
    """x, kernel and a y in the range of the convolution."""
    c_in, c_out = channels if kind == "full" else (channels[1], channels[1])
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *case.size, c_in), np.float32)
    kernel = rng.standard_normal((*case.taps, c_in if kind == "full" else 1, c_out), np.float32)
    y = rng.standard_normal(jax.eval_shape(partial(reference, case), x, kernel).shape, np.float32)
    return tuple(jnp.asarray(a, dtype) for a in (x, kernel, y))


def reference(case, x, kernel):
    """The compiler's own convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (case.stride,) * 2,
        case.pads,
        rhs_dilation=(case.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def pair(case, kind):
    """The convolution and its adjoint as functions of (image, kernel)."""
    forward, adjoint = (conv, conv_adjoint) if kind == "full" else (depthwise, depthwise_adjoint)
    return partial(forward, **case.options), partial(adjoint, **case.options, size=case.size)


def close(actual, desired, *, of=None):
    """Equal up to float32 rounding of sums of a few hundred products of size `of`."""
    desired = np.asarray(desired, np.float32)
    scale = np.max(np.abs(desired)) if of is None else of
    np.testing.assert_allclose(np.asarray(actual, np.float32), desired, rtol=0, atol=3e-6 * scale + 1e-30)


def test_conv_is_the_textbook_sum():
    case = Case(size=(6, 5), stride=2, padding=1, dilation=2)
    x, kernel, y = operands(case, "full")
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = np.zeros(y.shape, np.float32)
    for i, j in np.ndindex(y.shape[1:3]):
        for a, b in np.ndindex(case.taps):
            expected[:, i, j] += padded[:, 2 * i + 2 * a, 2 * j + 2 * b] @ np.asarray(kernel[a, b])
    close(conv(x, kernel, **case.options), expected)


def test_depthwise_is_a_convolution_with_a_diagonal_kernel():
    x, kernel, _ = operands(Case(), "depthwise")
    diagonal = kernel[:, :, 0, :, None] * jnp.eye(kernel.shape[-1])[None, None]
    close(depthwise(x, kernel), conv(x, diagonal))


@kinds
@cases
def test_values_and_gradients_equal_the_compilers(case, kind):
    x, kernel, y = operands(case, kind)
    forward, adjoint = pair(case, kind)

    @jax.jit
    def both(x, kernel, y):
        results = []
        for f in (forward, partial(reference, case)):
            value, pullback = jax.vjp(f, x, kernel)
            results.append((value, *pullback(y)))
        return *results, adjoint(y, kernel)

    ours, theirs, transposed = both(x, kernel, y)
    for actual, desired in zip((*ours, transposed), (*theirs, theirs[1]), strict=True):
        close(actual, desired)


@kinds
@given(case=any_case(), seed=st.integers(0, 1000))
def test_adjoint_moves_across_the_inner_product(kind, case, seed):
    x, kernel, _ = operands(case, kind, seed)
    forward, adjoint = (partial(f, kernel=kernel) for f in pair(case, kind))
    check_adjoint(forward, adjoint, x.shape, trials=2, seed=seed, tolerance=3e-6)


@kinds
def test_adjoint_without_padding_grows_the_image_back(kind):
    case = Case(size=(9, 7), padding=0)
    x, kernel, y = operands(case, kind)
    adjoint = conv_adjoint if kind == "full" else depthwise_adjoint
    grown = adjoint(y, kernel, padding=0)
    assert grown.shape == x.shape
    close(grown, jax.vjp(lambda x: reference(case, x, kernel), x)[1](y)[0])


@kinds
@pytest.mark.parametrize("case", [Case(size=(4, 5)), Case(size=(5, 4), stride=2)], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["forward", "adjoint"])
def test_gradients_of_both_orders_equal_differences(kind, case, which):
    x, kernel, y = operands(case, kind, channels=(2, 3))
    f = jax.jit(pair(case, kind)[which])
    # Differences of a bilinear map have no truncation error; float32 rounding leaves about 1e-3.
    check_grads(f, ((x, y)[which], kernel), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


@kinds
def test_vjp_of_the_vjp_is_the_directional_derivative(kind):
    case = Case(stride=2)
    x, kernel, y = operands(case, kind)
    dx, dkernel, _ = operands(case, kind, seed=1)
    forward, _ = pair(case, kind)

    def pushforward(x, kernel, dx, dkernel):
        pullback = jax.vjp(forward, x, kernel)[1]
        return jax.vjp(pullback, jnp.zeros_like(y))[1]((dx, dkernel))[0]

    expected = forward(dx, kernel) + forward(x, dkernel)
    close(jax.jit(pushforward)(x, kernel, dx, dkernel), expected)


@kinds
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (None, 0, 0)], ids=str)
def test_eager_jit_and_vmap_agree_with_gradients(kind, axes):
    case = Case(size=(6, 8), stride=2)
    sets = [operands(case, kind, seed) for seed in range(3)]
    batch = [sets[0][i] if a is None else jnp.stack([s[i] for s in sets]) for i, a in enumerate(axes)]
    forward, adjoint = pair(case, kind)

    def everything(x, kernel, y):
        value, pullback = jax.vjp(forward, x, kernel)
        transposed, pullback_adjoint = jax.vjp(adjoint, y, kernel)
        return value, *pullback(y), transposed, *pullback_adjoint(x)

    mapped = jax.jit(jax.vmap(everything, in_axes=axes))(*batch)
    for i in range(3):
        arguments = [b if a is None else b[i] for b, a in zip(batch, axes, strict=True)]
        for eager, other in zip(everything(*arguments), mapped, strict=True):
            close(other[i], eager)


@kinds
def test_gradients_inside_scan_equal_unrolled(kind):
    case = Case()
    x, _, y = operands(case, kind, channels=(4, 4))
    kernels = 0.3 * jnp.stack([operands(case, kind, seed, channels=(4, 4))[1] for seed in range(3)])
    forward, adjoint = pair(case, kind)

    def step(x, kernel):
        return x - 0.1 * adjoint(jax.nn.relu(forward(x, kernel)), kernel)

    def scanned(x, kernels):
        return jnp.vdot(lax.scan(lambda x, k: (step(x, k), None), x, kernels)[0], y)

    def unrolled(x, kernels):
        for kernel in kernels:
            x = step(x, kernel)
        return jnp.vdot(x, y)

    ours, theirs = (jax.jit(jax.grad(f, (0, 1)))(x, kernels) for f in (scanned, unrolled))
    for actual, desired in zip(ours, theirs, strict=True):
        close(actual, desired)


@kinds
def test_bfloat16_stays_bfloat16_and_sums_in_float32(kind):
    case = Case(size=(16, 16))
    low = operands(case, kind, dtype=jnp.bfloat16)
    x, kernel, y = (a.astype(jnp.float32) for a in low)
    forward, adjoint = pair(case, kind)

    def everything(x, kernel, y):
        value, pullback = jax.vjp(forward, x, kernel)
        return value, *pullback(y), adjoint(y, kernel)

    for rounded, exact in zip(jax.jit(everything)(*low), jax.jit(everything)(x, kernel, y), strict=True):
        assert rounded.dtype == jnp.bfloat16
        # One rounding at the end: half a unit of 2^-7 relative to each element, never of the sum's terms.
        np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4 * jnp.max(jnp.abs(exact)))


def test_kernel_gradient_is_chosen_by_platform_when_lowered():
    x, kernel, y = operands(Case(), "full", channels=(16, 16))
    gradient = jax.jit(partial(operators._full_kernel_gradient, operators._form((8, 8), kernel, 1, None, 1)))
    cpu, cuda = (gradient.trace(x, y).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda"))
    assert "stablehlo.convolution" not in cpu
    assert "stablehlo.dot_general" in cpu
    assert "stablehlo.convolution" in cuda
    assert "stablehlo.dot_general" not in cuda
    assert "conditional" not in gradient.lower(x, y).compile().as_text()  # the choice costs nothing at run time


@cases
def test_both_platforms_kernel_gradients_are_equal(case):
    x, kernel, y = operands(case, "full")
    form = operators._form(case.size, kernel, case.stride, case.padding, case.dilation)
    rules = (operators._kernel_gradient_by_dots, operators._kernel_gradient_by_conv)
    by_dots, by_conv = (jax.jit(partial(rule, form))(x, y) for rule in rules)
    close(by_dots, by_conv)


@kinds
def test_an_empty_batch_has_zero_kernel_gradient(kind):
    x, kernel, y = operands(Case(), kind)
    gradient = jax.vjp(lambda k: pair(Case(), kind)[0](x[:0], k), kernel)[1](y[:0])[0]
    close(gradient, jnp.zeros_like(kernel))


@pytest.mark.parametrize("images", [4, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_in_blocks_is_every_image_by_itself(images, stride):
    """Images of 2^18 numbers: two make a block, and a batch of five, which two do not divide, has five."""
    x = jax.random.normal(jax.random.key(0), (images, 64, 64, 64))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 64))
    y = depthwise(x, kernel, stride=stride)
    close(y, jnp.concatenate([depthwise(one[None], kernel, stride=stride) for one in x]))
    back = depthwise_adjoint(y, kernel, stride=stride, size=(64, 64))
    each = [depthwise_adjoint(one[None], kernel, stride=stride, size=(64, 64)) for one in y]
    close(back, jnp.concatenate(each))


def test_blocks_of_images_sum_to_the_whole_batch():
    x = jax.random.normal(jax.random.key(0), (12, 32, 32, 16))  # 12 images in 6 blocks
    kernel, y = jnp.zeros((3, 3, 16, 16)), x[:, ::-1]
    ours, theirs = (jax.vjp(partial(f, x), kernel)[1](y)[0] for f in (conv, partial(reference, Case())))
    close(ours, theirs)


IMAGE, KERNEL = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv(IMAGE, jnp.ones((2, 3, 1, 1))), r"even size \(2, 3\)"),
        (lambda: conv(IMAGE, KERNEL, stride=0), r"`stride` \(=0\)"),
        (lambda: depthwise(IMAGE, KERNEL, dilation=0), r"`dilation` \(=0\)"),
        (lambda: depthwise(IMAGE, KERNEL, padding=-1), r"`padding` \(=-1\)"),
        (lambda: conv(IMAGE, KERNEL, padding=0, dilation=2), r"spans \(5, 5\) pixels"),
        (lambda: conv_adjoint(IMAGE, KERNEL, stride=2), r"`stride` \(=2\) above 1 needs `size`"),
        (lambda: depthwise_adjoint(IMAGE, KERNEL, stride=2, size=(9, 8)), r"`size` \(=\(9, 8\)\) .* \(5, 4\)"),
        *[
            (lambda f=f, x=x, k=k: unwrap(f)(x, k), message)  # as users call it: dtypes and shapes are unchecked
            for f in (conv, conv_adjoint, depthwise, depthwise_adjoint)
            for x, k, message in (
                (IMAGE.astype(jnp.uint8), KERNEL, "images of dtype uint8 must be floating"),
                (IMAGE, KERNEL.astype(jnp.int32), "kernel of dtype int32 must be floating"),
            )
        ],
        *[
            (lambda f=f, c=c, k=k: unwrap(f)(jnp.ones((1, 4, 4, c)), jnp.ones((3, 3, *k))), rf"\(kh, kw, 1, {c}\)")
            for f in (depthwise, depthwise_adjoint)
            for c, k in ((1, (1, 8)), (8, (1, 1)), (8, (8, 1)), (8, (8, 8)))
        ],
    ],
)
def test_bad_options_are_refused_by_name_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@kinds
def test_images_without_channels_have_gradients_without_numbers(kind):
    x, kernel = jnp.zeros((2, 4, 4, 0)), jnp.zeros((3, 3, 0, 5) if kind == "full" else (3, 3, 1, 0))
    forward, _ = pair(Case(size=(4, 4)), kind)
    gradients = jax.grad(lambda x, kernel: forward(x, kernel).sum(), (0, 1))(x, kernel)
    assert [g.shape for g in gradients] == [x.shape, kernel.shape]
