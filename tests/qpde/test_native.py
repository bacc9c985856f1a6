"""The native kernels: the sums of the operators, where a program may call them, and nowhere else."""

import math
import os
import platform
import shutil
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from qpde import models, native, operators

LIBRARY, LINE = native._library()
built = pytest.mark.skipif(LIBRARY is None, reason=LINE)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++") or os.environ.get(native.SWITCH) == "0",
    reason="kernels are for x86, built by g++, and not wanted where QPDE_NATIVE=0",
)
def test_the_kernels_are_there_where_they_can_be_built():
    assert LIBRARY is not None or "AVX2" in LINE, LINE


@pytest.mark.parametrize("value", ["1024", "yes", ""])
def test_another_value_of_the_switch_is_refused(value, monkeypatch):
    monkeypatch.setenv(native.SWITCH, value)
    with pytest.raises(ValueError, match=f"QPDE_NATIVE .={value!r}. must be 512, 256 or 0"):
        native._library.__wrapped__()


class Case(NamedTuple):
    """A convolution of so many channels over an image."""

    size: tuple[int, int] = (8, 8)
    channels: tuple[int, int] = (16, 16)
    taps: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int | None = None
    dilation: int = 1


# Widths of both sides of a register, a tile and a block of columns; what a stride or a padding leaves over.
CASES = [
    Case(),
    Case((7, 19), (3, 40), padding=0),
    Case((9, 8), (16, 33), stride=2),
    Case((8, 9), (5, 7), (5, 3), stride=3, padding=3, dilation=2),
    Case((5, 6), (20, 70), (1, 1)),
    Case((9, 9), (8, 16), (1, 1), stride=2),
    Case((6, 7), (4, 24), padding=4, dilation=2),
    Case((6, 5), (20, 20)),
]


def operands(case, *, depthwise=False, images=3, dtype=np.float32):
    """The static form, x, kernel and y."""
    c_in, c_out = (case.channels[1],) * 2 if depthwise else case.channels
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((*case.taps, 1 if depthwise else c_in, c_out), dtype)
    form = operators._form(case.size, kernel, case.stride, case.padding, case.dilation)
    x = rng.standard_normal((images, *case.size, c_in), dtype)
    y = rng.standard_normal((images, *form.size_out, c_out), dtype)
    return form, *(jnp.asarray(a) for a in (x, kernel, y))


def meetings(form, x):
    """For each tap the padded x at its pixels; writing there writes into the padded x."""
    (p, q), s, d = form.padding, form.stride, form.dilation
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (p, p), (q, q), (0, 0)])
    rows, columns = (s * (m - 1) + 1 for m in form.size_out)
    met = {
        t: padded[:, d * t[0] : d * t[0] + rows : s, d * t[1] : d * t[1] + columns : s] for t in np.ndindex(form.taps)
    }
    return padded, met


def close(actual, desired):
    tolerance = 3e-6 if actual.dtype == np.float32 else 1e-14
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.abs(desired).max())


@pytest.fixture(params=[512, 256])
def registers(request):
    """Each set of instructions that this processor has."""
    before = LIBRARY.qpde_instructions(512)
    if LIBRARY.qpde_instructions(request.param) != request.param:
        pytest.skip(f"this processor has no registers of {request.param} bits")
    yield
    LIBRARY.qpde_instructions(before)


def assert_textbook_sums(case, conv, adjoint, kernel_gradient, dtype=np.float32):
    """Of the three maps (form, a, b) -> c of a convolution."""
    form, x, kernel, y = operands(case, dtype=dtype)
    _, met = meetings(form, x)
    close(conv(form, x, kernel), sum(met[t] @ kernel[t] for t in met))

    back, to = meetings(form, np.zeros_like(x))
    for t in to:
        to[t][...] += np.asarray(y @ kernel[t].T)
    (p, q), (h, w) = form.padding, form.size
    close(adjoint(form, y, kernel), back[:, p : p + h, q : q + w])

    products = np.stack([np.tensordot(met[t], np.asarray(y), ((0, 1, 2),) * 2) for t in met])
    close(kernel_gradient(form, x, y), products.reshape(kernel.shape))


def assert_depthwise_textbook_sums(case, conv, adjoint, kernel_gradient, dtype=np.float32):
    """Of the three maps (form, a, b) -> c of a depthwise convolution."""
    form, x, kernel, y = operands(case, depthwise=True, dtype=dtype)
    _, met = meetings(form, x)
    close(conv(form, x, kernel), sum(met[t] * np.asarray(kernel[t]) for t in met))

    back, to = meetings(form, np.zeros_like(x))
    for t in to:
        to[t][...] += np.asarray(y) * np.asarray(kernel[t])
    (p, q), (h, w) = form.padding, form.size
    close(adjoint(form, y, kernel), back[:, p : p + h, q : q + w])

    close(kernel_gradient(form, x, y), np.stack([(met[t] * y).sum((0, 1, 2)) for t in met]).reshape(kernel.shape))


def gradient_of(conv, form, x, y):
    """The kernel's gradient by the rules of derivatives."""
    like = (*form.taps, 1 if conv is operators._depthwise else x.shape[-1], y.shape[-1])
    return jax.vjp(partial(conv, form, x), jnp.zeros(like, x.dtype))[1](y)[0]


@built
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("registers")
def test_kernels_are_the_textbook_sums(case, dtype):
    full = operators._conv, operators._conv_adjoint, partial(gradient_of, operators._conv)
    depthwise = operators._depthwise, operators._depthwise_adjoint, partial(gradient_of, operators._depthwise)
    with jax.enable_x64(dtype == np.float64):
        assert_textbook_sums(case, *full, dtype)
        assert_depthwise_textbook_sums(case, *depthwise, dtype)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_what_runs_in_place_of_a_kernel_is_the_same_sums(case):
    programs = (operators._full_conv, operators._full_adjoint, operators._full_kernel_gradient)
    assert_textbook_sums(case, *(jax.jit(program, static_argnums=0) for program in programs))
    programs = (operators._depthwise_conv, operators._depthwise_transpose, operators._depthwise_kernel_gradient)
    assert_depthwise_textbook_sums(case, *(jax.jit(program, static_argnums=0) for program in programs))


def codes(case, *, images=3):
    """As `operands`, of whole numbers: 0 to 15 in x and y, -8 to 7 in the kernel."""
    form, *arrays = operands(case, images=images)
    rng = np.random.default_rng(1)
    ranges = (0, 15), (-8, 7), (0, 15)
    return form, *(
        rng.integers(*ends, a.shape, endpoint=True).astype(np.float32) for a, ends in zip(arrays, ranges, strict=True)
    )


def exact(form, x, kernel):
    """The convolution's sums of whole numbers, rounded to float32 at the end."""
    _, met = meetings(form, x)
    sums = sum(met[t].astype(np.int64) @ kernel[t].astype(np.int64) for t in met)
    return sums.astype(np.float32)


def exact_adjoint(form, y, kernel):
    """The same of the adjoint; its sums must be below 2^53."""
    back, to = meetings(form, np.zeros((len(y), *form.size, kernel.shape[2])))
    for t in to:
        to[t][...] += y.astype(np.int64) @ kernel[t].T.astype(np.int64)
    (p, q), (h, w) = form.padding, form.size
    return back[:, p : p + h, q : q + w].astype(np.float32)


@st.composite
def cases(draw):
    """Convolutions that integers take, and some that they leave to floats."""
    size, taps = draw(st.tuples(*[st.integers(9, 20)] * 2)), draw(st.sampled_from([(1, 1), (3, 3), (5, 3)]))
    c_in, c_out = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    stride, dilation, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([None, 0, 2]))
    return Case(size, (draw(st.sampled_from([c_in, 4 * c_in])), c_out), taps, stride, padding, dilation)


@built
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
@pytest.mark.usefixtures("registers")
def test_codes_are_convolved_exactly(case):
    form, x, kernel, y = codes(case)
    np.testing.assert_array_equal(operators._conv(form, x, kernel), exact(form, x, kernel))
    np.testing.assert_array_equal(operators._conv_adjoint(form, y, kernel), exact_adjoint(form, y, kernel))


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_codes_are_convolved_exactly_without_kernels_too(case):
    form, x, kernel, y = codes(case)
    conv, adjoint = (jax.jit(f, static_argnums=0) for f in (operators._full_conv, operators._full_adjoint))
    np.testing.assert_array_equal(conv(form, x, kernel), exact(form, x, kernel))
    np.testing.assert_array_equal(adjoint(form, y, kernel), exact_adjoint(form, y, kernel))


@built
@pytest.mark.parametrize("case", [Case((9, 9), (64, 40)), Case((5, 6), (16, 70), (1, 1))], ids=str)
@pytest.mark.parametrize("other", [0.5, -1.0, 256.0, 65536.0, 1e10, np.inf, np.nan], ids=str)
@pytest.mark.usefixtures("registers")
def test_an_image_of_other_numbers_among_images_of_codes(case, other):
    form, x, kernel, _ = codes(case)
    expected = exact(form, x, kernel)
    x[1, -1, -1, -1] = other
    out = operators._conv(form, x, kernel)
    np.testing.assert_array_equal(out[::2], expected[::2])
    np.testing.assert_allclose(out[1], jax.jit(operators._full_conv, static_argnums=0)(form, x, kernel)[1], rtol=1e-6)


@built
@pytest.mark.parametrize("other", [0.5, -128.5, -129.0, 128.0, 1e10], ids=str)
@pytest.mark.usefixtures("registers")
def test_a_kernel_with_one_number_that_is_no_code(other):
    form, x, kernel, _ = codes(Case())
    kernel[-1, -1, -1, -1] = other
    close(operators._conv(form, x, kernel), jax.jit(operators._full_conv, static_argnums=0)(form, x, kernel))


@built
@pytest.mark.usefixtures("registers")
def test_codes_at_the_ends_of_their_ranges():
    form, x, kernel, _ = codes(Case())
    for weight in (-128.0, 127.0):
        out = operators._conv(form, np.full_like(x, 255.0), np.full_like(kernel, weight))
        np.testing.assert_array_equal(out, exact(form, np.full_like(x, 255), np.full_like(kernel, weight)))
    zeros = operators._conv(form, np.full_like(x, -0.0), kernel)
    np.testing.assert_array_equal(np.signbit(zeros), False)


@built
def test_sums_of_codes_above_what_floats_hold_are_rounded_once():
    form, x, kernel, _ = codes(Case(channels=(256, 16)))
    x, kernel = x + 240, kernel + 120
    before = LIBRARY.qpde_instructions(512)
    LIBRARY.qpde_instructions(256)  # AVX-512 has no integers before VNNI
    try:
        np.testing.assert_array_equal(operators._conv(form, x, kernel), exact(form, x, kernel))
    finally:
        LIBRARY.qpde_instructions(before)


@built
def test_a_kernel_gradient_is_the_same_in_every_bit_however_threads_share_it():
    form, x, kernel, y = operands(Case((16, 16)), images=37)
    gradient = jax.jit(lambda x, y: jax.vjp(partial(operators._conv, form, x), kernel)[1](y)[0])
    first = gradient(x, y)
    assert all(np.array_equal(gradient(x, y), first) for _ in range(20))


def all_three(x, kernel):
    """A convolution, its adjoint and a kernel gradient."""
    y, pullback = jax.vjp(operators.conv, x, kernel)
    return y, *pullback(y)


@built
def test_an_exported_program_calls_no_kernel():
    _, x, kernel, _ = operands(Case())
    function = jax.jit(all_three)
    exported = export.export(function, platforms=("cpu", "cuda", "tpu"))(x, kernel)
    assert "@qpde_" in function.lower(x, kernel).as_text()
    assert "@qpde_" not in exported.mlir_module()
    for here, there in zip(function(x, kernel), exported.call(x, kernel), strict=True):
        close(there, here)


@built
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_batch_split_by_the_compiler_calls_no_kernel(axis_type):
    _, x, kernel, _ = operands(Case(), images=4)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(axis_type,))
    function = jax.jit(all_three)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("batch")))
        assert "@qpde_" not in function.lower(split, kernel).as_text()
        results = function(split, kernel)
    for here, there in zip(function(x, kernel), results, strict=True):
        close(there, here)


@built
def test_each_device_of_a_shard_map_calls_kernels_for_its_images():
    _, x, kernel, _ = operands(Case(), images=4)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("batch"), P()), "out_specs": (P("batch"), P("batch"), P())}
    function = jax.jit(jax.shard_map(all_three, mesh=mesh, **specs))
    assert "@qpde_" in function.lower(x, kernel).as_text()
    for here, there in zip(all_three(x, kernel), function(x, kernel), strict=True):
        close(there, here)


@built
def test_under_vmap_one_kernel_takes_all_images_and_several_are_the_compilers():
    _, x, kernel, _ = operands(Case((6, 6), (4, 6)))
    several, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    mapped = jax.jit(jax.vmap(operators.conv, (0, None)))
    assert "@qpde_" in mapped.lower(several, kernel).as_text()
    close(mapped(several, kernel), np.stack([operators.conv(a, kernel) for a in several]))
    both = jax.jit(jax.vmap(operators.conv))
    assert "@qpde_" not in both.lower(several, kernels).as_text()
    close(both(several, kernels), np.stack(list(map(operators.conv, several, kernels))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 5)])
def test_what_is_materialized_is_itself(dtype, shape):
    x = jnp.arange(math.prod(shape)).reshape(shape).astype(dtype)
    for found in (native.materialize(x), jax.jit(native.materialize)(x)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x)
    kept = jax.jit(lambda x: (native.materialize(x + 1), x + 1))(x)  # also where the call may not write in place
    np.testing.assert_array_equal(*kept)


def test_materializing_is_linear_in_both_modes_and_under_vmap():
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)
    check_grads(lambda x: jnp.sin(native.materialize(jnp.square(x))), (x,), order=2, atol=1e-2, rtol=1e-2)
    mapped = jax.jit(jax.vmap(lambda x: native.materialize(2 * x), in_axes=1, out_axes=1))
    np.testing.assert_array_equal(mapped(x), 2 * x)


@built
def test_gradients_are_materialized_too_and_not_in_an_exported_program():
    function = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(native.materialize(x)))))
    assert function.lower(jnp.ones(3)).as_text().count("@qpde_materialize") >= 1
    assert "@qpde_" not in export.export(function)(jnp.ones(3)).mlir_module()


@built
def test_a_step_of_training_computes_the_output_of_every_block_once():
    model = models.create("stablenet20", num_classes=3, residual="precise", loop="unroll", act_bits=4)
    x = jnp.ones((2, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(params):
        return model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile().as_text()
    calls = compiled.count('custom_call_target="qpde_materialize"')
    assert calls == 2 * len(model.blocks)  # forwards and backwards


def test_other_dtypes_and_nothing_at_all_are_the_compilers():
    def program(images, dtype):
        x, kernel = jnp.ones((images, 8, 8, 4), dtype), jnp.ones((3, 3, 4, 4), dtype)
        return jax.jit(operators.conv).lower(x, kernel).as_text()

    if LIBRARY is not None:
        assert "@qpde_conv_float32" in program(2, jnp.float32)
        with jax.enable_x64(True):
            assert "@qpde_conv_float64" in program(2, jnp.float64)
    assert "@qpde_" not in program(2, jnp.bfloat16)
    assert "@qpde_" not in program(0, jnp.float32)


def test_the_line_for_the_log_says_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    native._library.cache_clear()
    try:
        assert native.describe() == "convolutions on CPUs are the compiler's: QPDE_NATIVE=0"
        _, x, kernel, _ = operands(Case(), images=5)  # of its own: what was traced before is as it was
        assert "@qpde_" not in jax.jit(operators.conv).lower(x, kernel).as_text()
    finally:
        native._library.cache_clear()
