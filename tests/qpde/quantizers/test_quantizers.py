"""The claims of qpde.quantizers, on random and on hostile numbers, and on the published quantizers' own results."""

import doctest
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from qpde import quantizers
from qpde.quantizers import (
    ACTIVATION_CLIP,
    LARGEST_LEVEL,
    WEIGHT_CLIP,
    dequantize,
    encode_activation,
    encode_weight,
    initial_clip,
    level_index,
    quantization_step,
    quantize_activation,
    quantize_weight,
    rounding,
    standardize_weight,
)

EPS = float(np.finfo(np.float32).eps)
SHAPE = (3, 3, 4, 5)  # one shape everywhere: one compilation for each kind of quantizer
LEVELS = ("uniform", "pot", "apot")
KINDS = [(levels, signed) for levels in LEVELS for signed in (True, False)]
kinds = st.sampled_from(KINDS)
bit_widths = st.integers(2, 8)
clips = st.floats(2.0**-7, 2.0**7, width=32)
tensors = hnp.arrays(np.float32, SHAPE, elements=st.floats(-250, 250, width=32, allow_subnormal=False))


def quantize(x, clip, bits, *, levels="uniform", signed=True, **options):
    if signed:
        return quantize_weight(x, clip, bits, levels=levels, **options)
    return quantize_activation(x, clip, bits, levels=levels, **options)


@cache
def compiled(levels, signed):
    """One program for all bits."""
    run = jax.jit(lambda x, clip, bits: quantize(x, clip, bits, levels=levels, signed=signed))
    return lambda x, clip, bits: np.asarray(run(x, jnp.float32(clip), jnp.int32(bits)))


@cache
def gradients(levels, signed):
    def run(x, clip, bits, g):
        return jax.vjp(lambda x, clip: quantize(x, clip, bits, levels=levels, signed=signed), x, clip)[1](g)

    run = jax.jit(run)
    return lambda x, clip, bits, g: [np.asarray(v) for v in run(x, jnp.float32(clip), jnp.int32(bits), g)]


def normal(seed, shape=SHAPE, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def published_levels(levels, bits):
    """Magnitudes written out by hand from Li, Dong and Wang (2020), one pair of bits at a time."""
    if levels == "pot":
        return np.array([0.0, *(2.0 ** -np.arange(2.0**bits - 1))])
    terms = {
        1: [(0,)],
        2: [(0, 1, 2)],
        3: [(0, 1, 3), (2,)],
        4: [(0, 2, 4), (1, 3, 5)],
        5: [(0, 2, 5), (1, 3, 6), (4,)],
        6: [(0, 3, 6), (1, 4, 7), (2, 5, 8)],
        7: [(0, 3, 7), (1, 4, 8), (2, 5, 9), (6,)],
        8: [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)],
    }[bits]
    sums = {0.0}
    for term in terms:
        sums = {total + value for total in sums for value in (0.0, *(2.0**-e for e in term))}
    return np.array(sorted(sums)) / max(sums)


# Parity with the published quantizers.

GOLDEN = [f"weight/{levels}/{bits}" for levels in LEVELS for bits in (2, 3, 4, 5)]
GOLDEN += [f"activation/{levels}/{bits}" for levels in LEVELS for bits in (2, 3, 4)]
GOLDEN += ["weight/uniform/8", "activation/uniform/8"]


@pytest.mark.parametrize("bits_are_traced", [False, True])
@pytest.mark.parametrize("case", GOLDEN)
def test_values_and_gradients_equal_the_published_ones(small_golden_dir, case, bits_are_traced):
    kind, levels, bits = case.split("/")
    with np.load(small_golden_dir / "quantizers.npz") as golden:
        names = ("x", "alpha", "y", "cotangent", "grad_x", "grad_alpha")
        x, clip, y, g, grad_x, grad_clip = (jnp.asarray(golden[f"{case}/{name}"]) for name in names)
    # OIHW to HWIO, NCHW to NHWC. The published weight quantizer standardizes.
    axes = (2, 3, 1, 0) if kind == "weight" else (0, 2, 3, 1)
    options = {"standardize": True} if kind == "weight" else {}
    bits = jnp.int32(bits) if bits_are_traced else int(bits)

    def run(x, clip):
        return quantize(x, clip, bits, levels=levels, signed=kind == "weight", **options)

    found, pullback = jax.vjp(run, x.transpose(axes), clip)
    found_x, found_clip = pullback(g.transpose(axes))
    # The float32 references differ from a float64 evaluation of the formulas by 5e-7 and, summed, by 4e-6.
    np.testing.assert_allclose(found, y.transpose(axes), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found_x, grad_x.transpose(axes), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(found_clip, grad_clip, rtol=1e-5, atol=1e-5)


def test_all_published_cases_are_tested(small_golden_dir):
    with np.load(small_golden_dir / "quantizers.npz") as golden:
        assert {name.rsplit("/", 1)[0] for name in golden.files} == set(GOLDEN)


def test_the_published_cases_beside_the_data_are_those_of_the_repository(golden_dir, small_golden_dir):
    with np.load(golden_dir / "quantizers.npz") as theirs, np.load(small_golden_dir / "quantizers.npz") as ours:
        assert theirs.files == ours.files
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_level_sets_equal_the_published_ones(small_golden_dir):
    with np.load(small_golden_dir / "quantizers.npz") as golden:
        for name in (name for name in golden.files if name.endswith("levels")):
            kind, levels, bits, _ = name.split("/")
            # The file's set for 2-bit weights is one its own values do not use: they are ternary.
            bits = int(bits) - (kind == "weight" and int(bits) > 2)
            np.testing.assert_allclose(np.sort(published_levels(levels, bits)), golden[name], rtol=1e-6)


# What a quantizer is.


@given(tensors, clips, bit_widths, kinds)
def test_there_are_at_most_two_to_the_bits_levels(x, clip, bits, kind):
    spread = np.linspace(-clip, clip, x.size, dtype=np.float32).reshape(SHAPE)
    y = [compiled(*kind)(values, clip, bits) for values in (x, spread)]
    assert len(np.unique(y)) <= 2**bits - kind[1]


@given(tensors, clips, bit_widths, st.booleans())
def test_error_is_at_most_half_a_step_inside_the_range(x, clip, bits, signed):
    y = compiled("uniform", signed)(x, clip, bits)
    clamped = np.clip(x, -clip if signed else 0, clip)
    step = float(quantization_step(clip, bits, signed=signed))
    assert np.abs(y - clamped).max() <= step / 2 + 4 * EPS * clip  # four roundings of numbers up to the clip


@given(tensors, clips, bit_widths, st.sampled_from(["pot", "apot"]), st.booleans())
def test_level_sets_give_the_nearest_level(x, clip, bits, levels, signed):
    y = compiled(levels, signed)(x, clip, bits).astype(np.float64)
    magnitudes = clip * published_levels(levels, bits - signed)
    clamped = np.clip(x.astype(np.float64), -clip if signed else 0, clip)
    nearest = np.abs(np.abs(clamped)[..., None] - magnitudes).min(-1)
    # A float32 quotient decides between two levels, so the choice may be wrong by its rounding.
    np.testing.assert_allclose(np.abs(y - clamped), nearest, atol=4 * EPS * clip)


@pytest.mark.parametrize("levels", ["pot", "apot"])
@pytest.mark.parametrize("bits_are_traced", [False, True])
def test_level_sets_are_complete_and_keep_their_levels(levels, bits_are_traced):
    for bits in range(2, 9):
        for signed in (True, False):
            magnitudes = published_levels(levels, bits - signed)
            magnitudes = magnitudes[(magnitudes == 0) | (magnitudes > 2.0**-125.5)].astype(np.float32)
            x = jnp.asarray(magnitudes)
            y = quantize(x, 1.0, jnp.int32(bits) if bits_are_traced else bits, levels=levels, signed=signed)
            np.testing.assert_array_equal(y, magnitudes)


@pytest.mark.parametrize(("levels", "signed"), KINDS)
def test_levels_are_numbered_in_their_order_and_one_by_one(levels, signed):
    fine = np.linspace(0, 1, 4001, dtype=np.float32)
    x = np.concatenate([-fine, fine, 2.0 ** -np.arange(126, dtype=np.float32)])
    number = jax.jit(lambda bits: level_index(x, 1.0, bits, levels=levels, signed=signed))
    for bits in (2, 3, 5, 8):
        y, found = quantize(jnp.asarray(x), 1.0, bits, levels=levels, signed=signed), number(jnp.int32(bits))
        np.testing.assert_array_equal(found, level_index(x, 1.0, bits, levels=levels, signed=signed))
        pairs = np.unique(np.stack([y, np.asarray(found, np.float32)], axis=1), axis=0)
        assert len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
        assert (np.diff(pairs[:, 1]) > 0).all()
        assert np.abs(pairs[:, 1]).max() <= LARGEST_LEVEL
        assert (pairs[pairs[:, 0] == 0, 1] == 0).all()
    with pytest.raises(ValueError, match="bits=16 have too many levels"):
        level_index(x, 1.0, 16, levels=levels, signed=signed)


def test_ties_between_levels_go_to_the_smaller_magnitude():
    # Magnitudes: ternary 0, 1; power of two (and additive, of two bits) 0, 1/4, 1/2, 1.
    np.testing.assert_array_equal(quantize_weight(jnp.array([0.5, -0.5]), 1.0, 2, levels="pot"), [0, 0])
    ties = jnp.array([0.125, 0.375, 0.75, -0.75])
    np.testing.assert_array_equal(quantize_weight(ties, 1.0, 3, levels="pot"), [0, 0.25, 0.5, -0.5])
    np.testing.assert_array_equal(quantize_weight(ties, 1.0, 3, levels="apot"), [0, 0.25, 0.5, -0.5])
    np.testing.assert_allclose(quantize_activation(jnp.array([0.5]), 1.0, 3, levels="apot"), [0.4], rtol=1e-6)


@given(st.integers(2, 15), st.integers(0, 2**32 - 1))
def test_uniform_rounding_is_half_to_even(bits, seed):
    """With a clip of n the step is 1, so that halves are exact."""
    n = 2 ** (bits - 1) - 1
    halves = np.random.default_rng(seed).integers(-2 * n, 2 * n + 1, SHAPE).astype(np.float32) / 2
    np.testing.assert_array_equal(compiled("uniform", True)(halves, n, bits), np.clip(np.round(halves), -n, n))


@given(tensors, clips, bit_widths, kinds)
def test_quantizers_are_monotone(x, clip, bits, kind):
    x = np.sort(x, axis=None).reshape(SHAPE)
    assert (np.diff(compiled(*kind)(x, clip, bits).ravel()) >= 0).all()


@given(tensors, clips, st.integers(2, 16), kinds)
def test_quantizing_twice_is_quantizing_once(x, clip, bits, kind):
    once = compiled(*kind)(x, clip, bits)
    np.testing.assert_array_equal(compiled(*kind)(once, clip, bits), once)


@given(tensors, clips, st.integers(2, 16), st.sampled_from(LEVELS))
def test_signed_quantizers_are_odd(x, clip, bits, levels):
    np.testing.assert_array_equal(compiled(levels, True)(-x, clip, bits), -compiled(levels, True)(x, clip, bits))


@given(tensors, clips, kinds)
def test_sixteen_bits_and_more_are_the_clamp_exactly(x, clip, kind):
    expected = np.clip(x, -np.float32(clip) if kind[1] else 0, np.float32(clip))
    for bits in (16, 17, 1000):
        np.testing.assert_array_equal(compiled(*kind)(x, clip, bits), expected)
    for bits in (16, 32):
        np.testing.assert_array_equal(quantize(jnp.asarray(x), clip, bits, levels=kind[0], signed=kind[1]), expected)


@given(tensors, clips, st.integers(2, 16), kinds)
def test_a_signed_activation_is_a_weight(x, clip, bits, kind):
    y = quantize_activation(jnp.asarray(x), clip, jnp.int32(bits), levels=kind[0], signed=True)
    np.testing.assert_array_equal(y, compiled(kind[0], True)(x, clip, bits))


# Gradients.


@given(tensors, clips, st.integers(2, 16), kinds, st.integers(0, 2**32 - 1))
def test_gradients_are_the_closed_forms(x, clip, bits, kind, seed):
    levels, signed = kind
    clip, g = np.float32(clip), normal(seed)
    # The ends belong to the range.
    x[0, 0, 0, :3] = clip, -clip, 0
    grad_x, grad_clip = gradients(levels, signed)(x, clip, bits, g)
    rounded = compiled(levels, signed)(x, clip, bits)

    inside = (x >= (-clip if signed else 0)) & (x <= clip)
    everywhere = signed and bits == 2
    np.testing.assert_array_equal(grad_x, np.where(inside | everywhere, g, 0))
    v = x.astype(np.float64) / clip
    outside = np.sign(v) if signed else (v > 1)
    elements = g * np.where(inside, rounded / clip - v, outside)
    # Each term is a rounded difference of numbers up to 1.
    tolerance = 8 * EPS * np.abs(g).sum()
    np.testing.assert_allclose(grad_clip, elements.sum(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bits", [2, jnp.int32(2)])
def test_two_signed_bits_alone_have_the_gradient_one_everywhere(levels, bits):
    x = jnp.array([-3.0, -1.0, -0.2, 0.0, 0.4, 1.0, 1.5])  # the clip is 1
    slope = lambda bits, **options: jax.grad(lambda x: quantize(x, 1.0, bits, levels=levels, **options).sum())(x)  # noqa: E731
    np.testing.assert_array_equal(slope(bits), np.ones(7))
    np.testing.assert_array_equal(slope(bits + 1), [0, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(slope(bits, signed=False), [0, 0, 0, 1, 1, 1, 0])


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_of_the_clamp_pass_finite_differences(signed):
    x = jnp.asarray(normal(0, (4, 6)))  # no value is as near to an end as the difference
    check_grads(lambda x, clip: quantize(x, clip, 16, signed=signed), (x, jnp.float32(1.1)), 1, modes=["rev"], eps=1e-3)
    clip = jnp.linspace(0.5, 1.5, 6)
    check_grads(lambda x, clip: quantize(x, clip, 16, signed=signed), (x, clip), 1, modes=["rev"], eps=1e-3)


@pytest.mark.parametrize("bits", [4, jnp.int32(4)])
def test_gradient_scale_multiplies_the_gradient_of_the_clip_only(bits):
    x = jnp.asarray(normal(1))

    def run(scale):
        def loss(x, clip):
            return jnp.sum(quantize_weight(x, clip, bits, gradient_scale=scale) ** 2)

        return jax.value_and_grad(loss, (0, 1))(x, jnp.float32(1.2))

    value, (grad_x, grad_clip) = run(1.0)
    for scale in (0.25, jnp.float32(0.25)):
        scaled_value, (scaled_x, scaled_clip) = run(scale)
        assert value == scaled_value
        np.testing.assert_array_equal(grad_x, scaled_x)
        np.testing.assert_allclose(scaled_clip, grad_clip / 4, rtol=1e-6)


def test_traced_bits_have_no_gradient_and_do_not_disturb_the_others():
    x, clip = jnp.asarray(normal(2)), jnp.float32(1.5)

    def loss(x, clip, bits):
        return jnp.sum(quantize_weight(x, clip, bits) ** 2)

    grad_x, grad_clip, grad_bits = jax.grad(loss, (0, 1, 2))(x, clip, jnp.float32(4))
    assert grad_bits == 0
    expected = jax.grad(loss, (0, 1))(x, clip, 4)
    np.testing.assert_array_equal(grad_x, expected[0])
    np.testing.assert_allclose(grad_clip, expected[1], rtol=1e-5)


# Programs.


@pytest.mark.parametrize(("levels", "signed"), KINDS)
def test_eager_jit_vmap_static_and_traced_bits_agree(levels, signed):
    x, clips = jnp.asarray(normal(3, (4, *SHAPE))), jnp.array([0.5, 1.0, 2.0, 3.0])
    widths = jnp.array([2, 4, 8, 16])
    g = jnp.asarray(normal(4, SHAPE))

    def run(x, clip, bits):
        y, pullback = jax.vjp(lambda x, clip: quantize(x, clip, bits, levels=levels, signed=signed), x, clip)
        return y, *pullback(g)

    batched = jax.jit(jax.vmap(run))(x, clips, widths)
    for i, bits in enumerate((2, 4, 8, 16)):
        for each in (
            run(x[i], clips[i], bits),
            run(x[i], clips[i], widths[i]),
            run(x[i], clips[i], jnp.float32(bits)),
        ):
            np.testing.assert_array_equal(each[0], batched[0][i])
            np.testing.assert_array_equal(each[1], batched[1][i])
            # The sums for the clip may run in another order.
            np.testing.assert_allclose(each[2], batched[2][i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS)
def test_changing_traced_bits_compiles_once(levels):
    compilations = 0

    @jax.jit
    def step(w, x, clip, bits):
        nonlocal compilations
        compilations += 1
        loss = lambda w: jnp.sum(quantize_weight(w, clip, bits, levels=levels, standardize=True) * x)  # noqa: E731
        return jax.grad(loss)(w), quantize_activation(x, clip, bits, levels=levels)

    x = np.where(normal(6) > 0, np.random.default_rng(6).random(SHAPE), 2.0 ** -np.linspace(0, 126, 180).reshape(SHAPE))
    x = x.astype(np.float32)
    results = [step(normal(5), x, jnp.float32(1), jnp.int32(bits)) for bits in range(2, 33)]
    assert compilations == 1
    assert step._cache_size() == 1
    # 2..15 bits and the clamp; level sets end at 8 bits, powers of two at the smallest float, which 7 bits reach.
    assert len({np.asarray(y).tobytes() for _, y in results}) == {"uniform": 15, "pot": 7, "apot": 8}[levels]


@pytest.mark.parametrize("options", [{}, {"standardize": True, "per_channel_statistics": True, "gradient_scale": 0.1}])
def test_bits_none_returns_the_input_and_adds_no_operation(options):
    w = jnp.asarray(normal(7))
    assert quantize_weight(w, 3.0, None, **options) is w
    assert quantize_activation(w, 3.0, None) is w
    assert not jax.make_jaxpr(lambda w, clip: quantize_weight(w, clip, None, **options))(w, 3.0).eqns
    assert not jax.make_jaxpr(lambda x, clip: quantize_activation(x, clip, None))(w, 3.0).eqns


@pytest.mark.parametrize(("levels", "signed"), KINDS)
def test_one_clip_per_channel_is_a_loop_over_channels(levels, signed):
    x, clips, g = jnp.asarray(normal(8)), jnp.linspace(0.3, 2.0, SHAPE[-1]), jnp.asarray(normal(9))

    def run(x, clip, g):
        y, pullback = jax.vjp(lambda x, clip: quantize(x, clip, 4, levels=levels, signed=signed), x, clip)
        return y, *pullback(g)

    y, grad_x, grad_clip = run(x, clips, g)
    assert grad_clip.shape == clips.shape
    for c in range(SHAPE[-1]):
        one = run(x[..., c], clips[c], g[..., c])
        np.testing.assert_array_equal(y[..., c], one[0])
        np.testing.assert_array_equal(grad_x[..., c], one[1])
        np.testing.assert_allclose(grad_clip[c], one[2], rtol=1e-5, atol=1e-6)


def test_a_batch_over_four_devices_gives_the_same():
    x, g, clip = normal(10, (8, 4, 4, 3)), normal(11, (8, 4, 4, 3)), jnp.float32(1.5)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = [jax.device_put(v, NamedSharding(mesh, PartitionSpec("batch"))) for v in (x, g)]

    @jax.jit
    def run(x, g, clip):
        y, pullback = jax.vjp(lambda x, clip: quantize_activation(x, clip, 4), x, clip)
        return y, *pullback(g)

    y, grad_x, grad_clip = run(*spread, clip)
    expected = run(x, g, clip)
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(grad_x, expected[1])
    np.testing.assert_allclose(grad_clip, expected[2], rtol=1e-5)
    assert y.sharding.spec[0] == grad_x.sharding.spec[0] == "batch"


@pytest.mark.parametrize("shape", [(), (7,), (1, 5)])
def test_tensors_of_low_rank_work(shape):
    x = jnp.asarray(normal(12, shape))
    clip = jnp.float32(0.8)
    grad_clip = jax.grad(lambda clip: jnp.sum(quantize_weight(x, clip, 4)))(clip)
    v = np.asarray(x, np.float64) / 0.8
    expected = np.where(np.abs(v) <= 1, np.round(np.clip(v, -1, 1) * 7) / 7 - v, np.sign(v)).sum()
    np.testing.assert_allclose(grad_clip, expected, atol=1e-5)


@pytest.mark.parametrize(("levels", "signed"), KINDS)
def test_bfloat16_is_computed_in_float32(levels, signed):
    x = jnp.asarray(normal(13)).astype(jnp.bfloat16)
    g = jnp.asarray(normal(14))

    def run(x, clip, g):
        y, pullback = jax.vjp(lambda x, clip: quantize(x, clip, 8, levels=levels, signed=signed), x, clip)
        return y, *pullback(g.astype(x.dtype))

    y, grad_x, grad_clip = run(x, jnp.float32(1.7), g)
    wide = run(x.astype(jnp.float32), jnp.float32(1.7), g.astype(jnp.bfloat16))
    assert (y.dtype, grad_x.dtype, grad_clip.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, wide[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(grad_x, wide[1].astype(jnp.bfloat16))
    np.testing.assert_allclose(grad_clip, wide[2], rtol=1e-5, atol=1e-6)


# Numbers that are none.


@pytest.mark.parametrize(("levels", "signed"), KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_nan_and_infinity_stay_what_they_are(levels, signed, bits):
    x = np.zeros(SHAPE, np.float32)
    x[0, 0, 0, :4] = np.nan, np.inf, -np.inf, 1e30
    clean = np.nan_to_num(x, nan=0, posinf=0, neginf=0)
    for run in (compiled(levels, signed), lambda x, *a: quantize(x, *a, levels=levels, signed=signed)):
        y = run(jnp.asarray(x), 1.0, bits)
        np.testing.assert_array_equal(y[0, 0, 0, :3], x[0, 0, 0, :3])
        np.testing.assert_array_equal(y.ravel()[3:], run(jnp.asarray(clean), 1.0, bits).ravel()[3:])
    # A NaN in the data reaches the clip's gradient: the step that would hide it is a NaN step.
    assert np.isnan(gradients(levels, signed)(x, 1.0, bits, np.ones_like(x))[1])


@pytest.mark.parametrize(("levels", "signed"), KINDS)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_clip_that_is_nan_makes_everything_nan(levels, signed, bits):
    assert np.isnan(compiled(levels, signed)(normal(15), np.nan, bits)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_standardizing_or_encoding_what_is_not_finite_gives_no_number(value):
    w = normal(16)
    w[0, 0, 0, 0] = value
    assert np.isnan(quantize_weight(w, 3.0, 4, standardize=True)).all()
    per_channel = np.asarray(quantize_weight(w, 3.0, 4, standardize=True, per_channel_statistics=True))
    assert np.isnan(per_channel[..., 0]).all()
    assert np.isfinite(per_channel[..., 1:]).all()
    assert np.isnan(encode_activation(w, 3.0, 4).scale)
    scale = encode_weight(w, jnp.full(SHAPE[-1], 3.0), 4).scale
    np.testing.assert_array_equal(np.isnan(scale), [True, False, False, False, False])


# The integer form.


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_times_scale_equal_the_rounded_tensor_bit_for_bit(bits, per_channel):
    x = jnp.asarray(normal(bits, (8, 40, 5)))
    clip = jnp.linspace(0.7, 2.9, 5) if per_channel else jnp.float32(1.3)
    for signed, dtype, largest in ((True, jnp.int8, 2 ** (bits - 1) - 1), (False, jnp.uint8, 2**bits - 1)):
        encode = encode_weight if signed else encode_activation

        def integers(x, clip, bits, encode=encode):
            return dequantize(*encode(x, clip, bits))

        def rounded(x, clip, bits, signed=signed):
            return quantize(x, clip, bits, signed=signed)

        # Eager, compiled with static, with traced bits, and with a clip that the compiler knows.
        reference = rounded(x, clip, bits)
        codes, scale = encode(x, clip, bits)
        assert codes.dtype == dtype
        assert (codes.shape, scale.shape) == (x.shape, clip.shape)
        assert codes.max() == largest
        assert codes.min() == (-largest if signed else 0)
        np.testing.assert_array_equal(scale, quantization_step(clip, bits, signed=signed))
        np.testing.assert_allclose(scale, clip / largest, rtol=2 * EPS)
        same_bits(dequantize(codes, scale), reference)

        @jax.jit
        def programs(x, given, traced_bits, clip=clip, integers=integers, rounded=rounded):
            arguments = [(given, bits), (clip, bits), (given, traced_bits)]
            return [run(x, *each) for run in (integers, rounded) for each in arguments]

        for found in programs(x, clip, jnp.int32(bits)):
            same_bits(found, reference)


@given(tensors, clips, bit_widths, st.booleans())
def test_codes_equal_the_rounded_tensor_on_hostile_numbers(x, clip, bits, signed):
    clip = jnp.float32(clip)
    codes = encode_activation(jnp.asarray(x), clip, jnp.int32(bits), signed=signed)
    same_bits(dequantize(*codes), compiled("uniform", signed)(x, clip, bits))


@pytest.mark.parametrize("per_channel", [False, True])
def test_standardized_weights_have_codes(per_channel):
    w, options = jnp.asarray(normal(17)), {"standardize": True, "per_channel_statistics": per_channel}
    same_bits(dequantize(*encode_weight(w, 3.0, 4, **options)), quantize_weight(w, 3.0, 4, **options))


# Standardization.


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.floats(-3, 3), st.booleans())
def test_standardized_weights_have_mean_zero_and_deviation_one(seed, scale, shift, per_channel):
    w = normal(seed) * np.float32(scale) + np.float32(shift * scale)
    axes = (0, 1, 2) if per_channel else None
    found = np.asarray(standardize_weight(jnp.asarray(w), per_channel=per_channel))
    expected = (w - w.mean(axes, keepdims=True)) / w.std(axes, ddof=1, keepdims=True)
    # The mean cancels up to three deviations, or ten of a small sample.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.std(axes, ddof=1), 1, rtol=1e-4)


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_flow_through_mean_and_deviation(per_channel):
    w, g = jnp.asarray(normal(18, (5, 4))), jnp.asarray(normal(19, (5, 4)))
    check_grads(lambda w: standardize_weight(w, per_channel=per_channel), (w,), 1, modes=["rev"], eps=1e-3)
    # The result ignores shifts and scales of w, so its gradient is orthogonal to both.
    grad = jax.grad(lambda w: jnp.sum(quantize_weight(w, 1.0, 4, standardize=True) * g))(w)
    np.testing.assert_allclose([grad.sum(), jnp.vdot(grad, w)], 0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.25, 0.3, -1e3])
def test_a_constant_weight_standardizes_to_something_finite(value):
    w = jnp.full(SHAPE, value)
    found = standardize_weight(w)
    assert (jnp.abs(found) <= 1).all()
    if value in (0.0, 0.25):  # whose mean is exact
        np.testing.assert_array_equal(found, 0)
    assert jnp.isfinite(jax.grad(lambda w: jnp.sum(standardize_weight(w) * normal(20)))(w)).all()


# The start of a clip.


@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.floats(50, 100))
def test_simple_starts_equal_their_definitions(seed, signed, per_channel, percentile):
    x = normal(seed)
    a = np.abs(x) if signed else np.maximum(x, 0)
    axes = (0, 1, 2) if per_channel else None
    n = 2 ** (4 - signed) - 1
    expected = {
        "constant": np.full(SHAPE[-1:] if per_channel else (), WEIGHT_CLIP if signed else ACTIVATION_CLIP),
        "absmax": a.max(axes),
        "percentile": np.percentile(a, percentile, axis=axes),
        "rms": 4 * np.sqrt((a**2).mean(axes)),
        "lsq": n * 2 * a.mean(axes) / np.sqrt(n),
    }
    for method, value in expected.items():
        options = {"signed": signed, "per_channel": per_channel, "percentile": percentile}
        found = initial_clip(jnp.asarray(x), 4, method=method, **options)
        assert (found.shape, found.dtype) == (value.shape, jnp.float32)
        np.testing.assert_allclose(found, np.where(value > 0, value, expected["constant"]), rtol=1e-4, err_msg=method)


@pytest.mark.parametrize(
    ("levels", "signed", "per_channel"),
    [("uniform", True, False), ("uniform", False, True), ("pot", True, True), ("apot", True, True)],
)
def test_the_mse_start_is_no_worse_than_any_clip_on_a_grid(levels, signed, per_channel):
    """It is by construction the best of 80 fractions of the maximum, or better.

    Between those the error has more minima, but shallow ones, and the second search is 8 times finer: against a foreign
    grid an excess of 3% is allowed.
    """
    x = jnp.asarray(normal(21, (6, 50, 3)))

    @jax.jit
    def error(clip, bits):
        difference = x - quantize(x, clip, bits, levels=levels, signed=signed)
        return jnp.sum(difference**2, axis=(0, 1) if per_channel else None)

    for bits in (2, jnp.int32(4), 6):
        options = {"signed": signed, "per_channel": per_channel, "levels": levels}
        found = error(initial_clip(x, bits, method="mse", **options), jnp.int32(bits))
        largest = initial_clip(x, bits, method="absmax", **options)
        for fraction in range(1, 81):
            # The sums of two programs differ in their last digits.
            assert (found <= error(largest * (fraction / 64), jnp.int32(bits)) * (1 + 1e-5)).all()
        for fraction in np.linspace(0.05, 1.25, 29):
            assert (found <= error(largest * float(fraction), jnp.int32(bits)) * 1.03).all()


def test_the_searched_starts_of_an_unrounded_quantizer_are_the_maximum():
    x = jnp.asarray(normal(22))
    for bits in (None, 16, jnp.int32(20)):
        for method in ("mse", "entropy"):
            assert initial_clip(x, bits, signed=True, method=method) == jnp.max(jnp.abs(x))


def entropy_by_hand(a, counts, bits, signed):
    """The divergence of every candidate clip, from plain loops; the best one as a fraction of the maximum."""
    bins, n, total = 2048, 2 ** (bits - signed) - 1, counts[a > 0].sum()
    divergences = {}
    limit = a.max()
    while counts[a > limit / 2].sum() <= 1e-3 * total:
        limit = limit / 2
    below = (a > 0) & (a <= limit)
    histogram = np.zeros(bins)
    np.add.at(histogram, np.ceil(a[below] / limit * bins).astype(int) - 1, counts[below])
    for end in range(16, bins + 1, 16):
        level = np.round((np.arange(end) + 0.5) / end * n)
        inside = histogram[:end]
        p, q = inside.copy(), np.zeros(end)
        last = inside * (level == level[-1])
        last = last if last.any() else np.eye(end)[-1]
        p += (total - inside.sum()) * last / last.sum()
        for value in np.unique(level):
            cell = (level == value) & (inside > 0)
            if cell.any():
                q[cell] = inside[cell].sum() / cell.sum()
        p, q = p / total, q / total
        some = p > 0
        divergences[end / bins * limit / a.max()] = (p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum()
    return min(divergences, key=divergences.get), divergences


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True), (8, False)])
def test_the_entropy_start_has_the_least_divergence(bits, signed):
    x = np.random.default_rng(bits).laplace(size=6000).astype(np.float32)
    a = np.abs(x) if signed else np.maximum(x, 0)
    best, divergences = entropy_by_hand(a, np.ones(6000), bits, signed)
    for width in (bits, jnp.int32(bits)):
        found = float(initial_clip(jnp.asarray(x), width, signed=signed, method="entropy") / a.max())
        found = min(divergences, key=lambda fraction: abs(fraction - found))
        # Data on the edge of a bin may be counted on its other side.
        assert divergences[found] <= divergences[best] + 1e-4
    assert best < 1 or bits == 8


@pytest.mark.parametrize("method", ["absmax", "percentile", "rms", "mse", "entropy", "lsq"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_counts_stand_for_repeated_values(method, per_channel):
    values = normal(24, (40, 3))
    counts = np.random.default_rng(25).integers(0, 4, 40)
    repeated = jnp.asarray(np.repeat(values, counts, axis=0))
    options = {"signed": True, "method": method, "per_channel": per_channel, "percentile": 97.3}
    expected = initial_clip(repeated, 3, **options)
    counts = jnp.asarray(np.broadcast_to(counts[:, None], values.shape), jnp.float32)
    # Float32 sums in another order; the largest value may not occur at all.
    np.testing.assert_allclose(initial_clip(jnp.asarray(values), 3, **options, counts=counts), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["constant", "absmax", "percentile", "rms", "mse", "entropy", "lsq"])
def test_starts_are_positive_finite_and_work_under_jit(method):
    for signed in (True, False):
        constant = WEIGHT_CLIP if signed else ACTIVATION_CLIP
        assert initial_clip(jnp.zeros(SHAPE), 4, signed=signed, method=method) == constant
        x = jnp.asarray(normal(23)).at[..., 2].set(0)
        run = lambda x, s=signed: initial_clip(x, 4, signed=s, method=method, per_channel=True)  # noqa: E731
        eager, compiled_ = run(x), jax.jit(run)(x)
        assert (eager > 0).all()
        assert eager[2] == constant
        np.testing.assert_allclose(eager, compiled_, rtol=1e-5)
        nan = initial_clip(x.at[0].set(jnp.nan), 4, signed=signed, method=method)
        assert jnp.isnan(nan) or method == "constant"


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (2, 3, 0, 4)])
def test_a_tensor_of_no_numbers_has_codes_and_a_gradient_of_zero(shape):
    x = jnp.zeros(shape)
    for quantize, encode in ((quantize_weight, encode_weight), (quantize_activation, encode_activation)):
        assert encode(x, 1.0, 4).codes.shape == shape
        for clip in (jnp.float32(1.0), jnp.ones(shape[-1:])):
            gradients = jax.grad(lambda x, c, quantize=quantize: quantize(x, c, 4).sum(), (0, 1))(x, clip)
            for gradient, of in zip(gradients, (x, clip), strict=True):
                np.testing.assert_array_equal(gradient, jnp.zeros_like(of))


STARTS = ("absmax", "percentile", "rms", "mse", "entropy", "lsq")


@pytest.mark.parametrize("method", STARTS)
def test_a_start_scales_with_the_data_over_the_range_of_floats(method):
    """Channels of one tensor, as they decay: each has the clip of its own scale."""
    x = normal(26, (400,))
    scales = np.float32([1, 1e-36, 1e-30, 1e-19, 1e-10, 1e10, 1e19, 1e30, 2e37])
    for levels in ("uniform", "pot"):
        options = {"signed": True, "method": method, "levels": levels, "per_channel": True}
        found = initial_clip(jnp.asarray(x[:, None] * scales), 4, **options)
        np.testing.assert_allclose(found / scales, np.full(scales.shape, found[0]), rtol=1e-3)


def test_a_start_is_no_larger_than_the_largest_float():
    x = jnp.full(4, 3e38)
    assert initial_clip(x, 4, signed=True, method="rms") == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_start_from_data_that_are_not_finite_is_nan(method, bad):
    x = jnp.asarray(normal(27, (50, 3))).at[7, 1].set(bad)
    for signed in (True, False):
        options = {"signed": signed, "method": method}
        assert jnp.isnan(initial_clip(x, 4, **options))
        np.testing.assert_array_equal(jnp.isnan(initial_clip(x, 4, **options, per_channel=True)), [False, True, False])


@pytest.mark.parametrize("outlier", [1e4, 1e6])
def test_one_outlier_does_not_move_the_entropy_start(outlier):
    x = np.random.default_rng(28).normal(size=20_000).astype(np.float32)
    calm = initial_clip(jnp.asarray(x), 4, signed=True, method="entropy")
    found = initial_clip(jnp.append(jnp.asarray(x), jnp.float32(outlier)), 4, signed=True, method="entropy")
    np.testing.assert_allclose(found, calm, rtol=0.25)


# What is refused.


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_a_clip_that_is_known_must_be_positive_and_finite(bad, kind):
    x, clip = jnp.ones((2, 2)), kind(bad)
    for value in (clip, jnp.array([1.0, bad])):
        for run in (
            lambda x, c: quantize_weight(x, c, 4),
            lambda x, c: quantize_activation(x, c, jnp.int32(4)),
            lambda x, c: encode_activation(x, c, 4).codes,
            lambda x, c: quantizers.level_index(x, c, 4),
            lambda x, c: quantization_step(c, 4, signed=True),
        ):
            with pytest.raises(ValueError, match="must be positive and finite"):
                run(x, value)
            jax.eval_shape(run, x, jnp.asarray(value))  # a traced one cannot be checked


@pytest.mark.parametrize("bits", [1, 33, 0, -4, 2.5, float("nan"), np.int64(1), True])
def test_bits_out_of_range_are_refused(bits):
    x = jnp.ones(SHAPE)
    for run in (quantize_weight, quantize_activation, encode_weight, encode_activation):
        with pytest.raises(ValueError, match=r"bits=.*2 to 32"):
            run(x, 1.0, bits)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: quantize_weight(x, 1.0, None, levels="log"), "unknown levels 'log'.*uniform, pot, apot"),
        (lambda x: quantize_weight(x, 1.0, 9, levels="apot"), "bits=9 are too many.*at most 8"),
        (lambda x: quantize_weight(x, 0.0, 4), "clip=0.0 must be positive"),
        (lambda x: quantize_activation(x, np.float32([1, 1, -1, 1, 1]), 4), "must be positive"),
        (lambda x: quantize_weight(x, float("nan"), 4), "clip=nan must be positive"),
        (lambda x: quantize_weight(x, jnp.ones(3), 4), r"clip has shape \(3,\).*\(5,\)"),
        (lambda x: quantize_weight(x, 1.0, jnp.array([2, 3])), r"bits have shape \(2,\)"),
        (lambda x: quantize_activation(x.astype(jnp.uint8), 1.0, 4), "dtype uint8"),
        (lambda x: standardize_weight(x[:1, :1, :1], per_channel=True), "at least 2"),
        (lambda x: encode_weight(x, 1.0, None), "bits=None"),
        (lambda x: encode_activation(x, 1.0, 9), "bits=9 do not fit"),
        (lambda x: initial_clip(x, 4, signed=True, method="best"), "unknown method 'best'.*absmax"),
        (lambda x: initial_clip(x, None, signed=True, method="lsq"), "lsq"),
        (lambda x: initial_clip(x[:0], 4, signed=True), "no data"),
        (lambda x: initial_clip(x[0, 0, 0, 0], 4, signed=True, per_channel=True), "scalar"),
        (lambda x: initial_clip(x, 4, signed=True, percentile=0.0), "percentile=0.0"),
        (lambda x: initial_clip(x, 4, signed=True, rms_factor=-1.0), "rms_factor=-1.0"),
    ],
)
def test_bad_arguments_are_refused_by_name(run, message):
    with pytest.raises(ValueError, match=message):
        run(jnp.ones(SHAPE))


def test_examples_in_the_docstrings_are_true():
    assert doctest.testmod(rounding) == (0, 3)
