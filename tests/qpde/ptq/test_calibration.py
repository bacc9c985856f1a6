"""Post-training quantization: histograms of streams, equalization, and trained networks in few bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qpde
from qpde import Bits, graphs, models
from qpde.measure import histograms
from qpde.measure.histograms import clip_from, edges, histogram, merge
from qpde.models.layers import is_depthwise
from qpde.ptq.calibration import correct_bias, quantize
from qpde.ptq.equalization import equalize
from qpde.quantizers import initial_clip, quantize_activation, quantize_weight

MOVING = ["batch_stats", "spectral"]
METHODS = ("absmax", "percentile", "mse", "entropy")


def images(n=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, 8, 8, 3))


STATISTICS = images(16, seed=9)


@functools.cache
def trained(name="resnet20", **options):
    """The first two stages of a network in full precision, with the norms and statistics of a trained one."""
    model = models.create(name, num_classes=10, **options)
    model = model.clone(architecture=model.architecture.with_blocks(*map(len, model.stages[:2])))

    @jax.jit
    def init(key, x):
        variables = jax.tree_util.tree_map_with_path(of_a_trained_network, model.init(key, x))
        moved = model.apply(variables, x, train=True, momentum=0.0, power_iterations=50, mutable=MOVING)[1]
        return {**variables, **moved}

    return model, init(jax.random.key(1), STATISTICS)


def of_a_trained_network(path, leaf):
    where = jax.tree_util.keystr(path)
    noise = jax.random.normal(jax.random.key(len(where) + leaf.size), leaf.shape)
    if "norm" in where and "'scale'" in where:
        return jnp.exp(0.5 * noise)
    if "norm" in where and "'bias'" in where:
        return 0.3 * noise
    return leaf * jnp.exp(0.5 * noise) if "kernel" in where else leaf


@functools.partial(jax.jit, static_argnames=("model", "return_states"))
def run(model, variables, x, bits=None, return_states=False):
    return model.apply(variables, x, bits=bits, return_states=return_states)


def relative_error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


# Histograms.

SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 64.0, 3e5])
DATA = st.tuples(st.integers(0, 2**31), st.integers(1, 60), SCALES, st.booleans())


def draw(seed, size, scale, with_zeros):
    x = np.random.default_rng(seed).standard_normal(size) * scale
    return jnp.asarray(np.where(x < 0.2 * scale, 0, x) if with_zeros else x, jnp.float32)


def padded(x):
    """One shape, so one compilation: zeros are counted apart, in the first bin."""
    return jnp.pad(x, (0, 60 - len(x)))


@functools.partial(jax.jit, static_argnames="signed")
def histogram_of(x, signed):
    return histogram(x, signed=signed, bins=64)


@given(data=DATA, signed=st.booleans())
def test_a_histogram_counts_zeros_and_what_lies_in_each_bin(data, signed):
    x = padded(draw(*data))
    counts, largest = histogram_of(x, signed)
    a = np.abs(np.asarray(x, np.float64)) if signed else np.maximum(np.asarray(x, np.float64), 0)
    assert largest == a.max()
    ends = np.asarray(edges(histograms.Histogram(counts, largest)), np.float64)
    np.testing.assert_array_equal(counts[1:], np.histogram(a[a > 0], ends)[0])
    # Two bins an octave: from its power of two to 1.5 times that, and from there to the next.
    if a.max() > 0:
        np.testing.assert_allclose(ends[3::2], 1.5 * ends[2:-1:2], rtol=0, atol=2e-38)  # smaller floats are zeros
        np.testing.assert_allclose(ends[4::2], 2 * ends[2:-1:2], rtol=0, atol=2e-38)
        assert ends[-3] <= a.max() < ends[-1]
    assert int(counts[0]) == (a == 0).sum()


@given(parts=st.lists(DATA, min_size=2, max_size=4), signed=st.booleans())
def test_merged_parts_are_the_histogram_of_the_whole_in_any_order(parts, signed):
    parts = [padded(draw(*part)) for part in parts]
    whole = histogram(jnp.concatenate(parts), signed=signed, bins=64)
    for order in (parts, parts[::-1]):
        merged = functools.reduce(jax.jit(merge), (histogram_of(part, signed) for part in order))
        np.testing.assert_array_equal(merged.counts, whole.counts)
        assert merged.largest == whole.largest


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_clip_of_a_histogram_is_that_of_the_data(bits, signed):
    x = draw(3, 100_000, 1.0, False)
    h = histogram(x, signed=signed)
    exact = {m: float(initial_clip(x, bits, signed=signed, method=m)) for m in METHODS}
    found = {m: float(clip_from(h, bits, signed=signed, method=m)) for m in METHODS}
    assert found["absmax"] == exact["absmax"]
    assert abs(found["percentile"] / exact["percentile"] - 1) <= 1 / 512
    # Two searches: their optima are equally good, not equal.
    assert squared_error(x, found["mse"], bits, signed) <= 1.01 * squared_error(x, exact["mse"], bits, signed)
    if bits == 3:  # at 8 the divergence is nearly flat
        assert abs(found["entropy"] - exact["entropy"]) <= 0.1 * exact["absmax"]


@pytest.mark.parametrize("outlier", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_one_outlier_does_not_blur_the_clip_of_a_stream(method, outlier):
    x = draw(4, 20_000, 1.0, False)
    far = jnp.full(1, outlier, jnp.float32)
    h = merge(histogram(x, signed=True), histogram(far, signed=True))
    exact = float(initial_clip(jnp.concatenate([x, far]), 4, signed=True, method=method))
    assert float(clip_from(h, 4, signed=True, method=method)) == pytest.approx(
        exact, rel=1 / 512 if method == "percentile" else 0.1
    )


def test_a_histogram_of_nothing_changes_nothing():
    x = draw(5, 40, 1.0, True)
    nothing = histogram(jnp.zeros((0, 3)), signed=True)
    assert float(nothing.counts.sum()) == nothing.largest == 0
    for merged in (merge(nothing, histogram(x, signed=True)), merge(histogram(x, signed=True), nothing)):
        np.testing.assert_array_equal(merged.counts, histogram(x, signed=True).counts)
    with pytest.raises(ValueError, match="32 times a power of two"):
        histogram(x, signed=True, bins=100)


def squared_error(x, clip, bits, signed):
    return float(jnp.sum((x - quantize_activation(x, clip, bits, signed=signed)) ** 2))


@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 4, 6]))
def test_the_mse_clip_of_a_stream_is_never_worse_than_its_maximum(seed, bits):
    parts = [jnp.asarray(np.random.default_rng(seed + i).laplace(size=400) * 4**i, jnp.float32) for i in range(3)]
    h = functools.reduce(merge, (histogram(part, signed=True) for part in parts))
    x = jnp.concatenate(parts)
    of_mse, of_absmax = (
        squared_error(x, clip_from(h, jnp.int32(bits), signed=True, method=m), jnp.int32(bits), True)
        for m in ("mse", "absmax")
    )
    # A value is known to half a bin.
    assert of_mse <= of_absmax * 1.01


# Equalization.

KINDS = [
    ("resnet20", {"symmetric": False}),
    ("resnet20", {"symmetric": True}),
    ("resnet20", {"norm": "tied", "smoothing": models.Smoothing()}),
    ("stablenet20", {"norm": "spectral", "residual": "precise"}),
    ("mobilenetv2", {"symmetric": False}),
]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_equalization_leaves_the_function_unchanged(name, options):
    model, variables = trained(name, **options)
    x = images(4, seed=2)
    equal = equalize(model, variables, [x])
    before, after = run(model, variables, x), run(model, equal, x)
    assert relative_error(after, before) < 2e-5
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), variables["params"], equal["params"])
    kernels = [v for k, v in jax.tree_util.tree_leaves_with_path(changed) if "kernel" in jax.tree_util.keystr(k)]
    assert sum(kernels) > 1


def test_equalized_channels_have_the_same_range():
    model, variables = trained(symmetric=False)
    x = images(4, seed=2)
    equal = equalize(model, variables, [x])
    for stage in ("stage0", "stage1"):
        for block in equal["params"][stage].values():
            for name in ("kernel1", "kernel2", "shortcut_kernel"):
                if name in block:
                    largest = jnp.abs(block[name]).max((1, 2, 3))
                    np.testing.assert_allclose(largest, np.broadcast_to(largest[:, :1], largest.shape), rtol=1e-5)


def test_activations_take_the_range_of_the_kernel_behind_them():
    """In a symmetric block with separate norms, which has no other free scale."""
    model, variables = trained(symmetric=True)
    x = images(4, seed=2)
    equal = equalize(model, variables, [x])
    z = seen(model, equal, x)["stage0"]["blocks1to2"]["act_clips"][1]
    kernel = equal["params"]["stage0"]["blocks1to2"]["kernel1"]
    ranges, alive = z.max((1, 2, 3)), z.max((1, 2, 3)) > 0
    np.testing.assert_allclose(ranges[alive], jnp.abs(kernel).max((1, 2, 3))[alive], rtol=1e-4)


@functools.partial(jax.jit, static_argnames="model")
def seen(model, variables, x):
    """What every activation quantizer is given."""

    def keep(x, clip, quantizer):
        return None if quantizer.is_weight else x, clip

    return model.apply(variables, x, observe=keep, mutable=["observed"])[1]["observed"]


def test_scales_that_are_not_free_are_left_alone():
    def activations(**options):
        block = models.create("resnet20", num_classes=2, **options).stages[0][1]
        return {s.act_index for s in block.scalings} - {None}

    assert activations(symmetric=False) == {1}
    assert activations(symmetric=True) == {1}
    assert activations(norm="tied") == set()
    assert activations(norm="spectral") == set()
    assert activations(symmetric=False, smoothing=models.Smoothing()) == set()
    with pytest.raises(ValueError, match="of GraphNetwork it is not known which norm"):
        equalize(models.create("gcn", num_classes=3), {}, [])
    with pytest.raises(ValueError, match="empty"):
        equalize(*trained(symmetric=False), [])


# Networks.


@pytest.mark.parametrize(("name", "options"), [KINDS[0], KINDS[4]])
def test_32_bits_mean_the_function_that_was_trained(name, options):
    model, variables = trained(name, **options)
    x = images(4, seed=3)
    methods = {"weights": "absmax", "activations": "absmax", "bias_correction": False}
    quantized, new = quantize(model, variables, [x], Bits(32, 32), **methods)
    assert quantized.bits == Bits(32, 32)
    # A depthwise kernel keeps 8 bits.
    tolerance = 0.03 if name == "mobilenetv2" else 1e-4
    assert relative_error(run(quantized, new, x), run(model, variables, x)) < tolerance


@functools.cache
def in_bits(bits, **options):
    model, variables = trained(**options)
    return quantize(model, variables, [images(8, seed=4), images(8, seed=5)], Bits(bits, bits))


def test_more_bits_are_closer_to_full_precision():
    x = images(16, seed=6)
    exact = run(*trained(symmetric=False), x)
    errors = {}
    for bits in (3, 4, 6, 8):
        model, variables = in_bits(bits, symmetric=False)
        any_width = model.with_bits(Bits())  # compiled once
        errors[bits] = relative_error(run(any_width, variables, x, bits=model.bits), exact)
    assert errors[8] < 0.5 * errors[6] < 0.5 * 0.5 * errors[4] < 0.5 * errors[3]
    assert errors[8] < 0.05


def test_widths_may_be_numbers_of_numpy():
    model, variables = trained(symmetric=False)
    found, of_numpy = quantize(model, variables, [images(8, seed=4)], Bits(np.int64(4), np.int32(4)))
    expected, usual = quantize(model, variables, [images(8, seed=4)], Bits(4, 4))
    assert found == expected
    jax.tree.map(np.testing.assert_array_equal, of_numpy, usual)


def test_clips_are_read_off_the_network_in_full_precision():
    model, variables = trained(symmetric=False)
    x = images(8, seed=4)
    _, new = quantize(model, variables, [x], Bits(None, 4), activations="absmax", bias_correction=False)
    _, states = run(model, variables, x, return_states=True)
    clips = new["params"]["stage0"]["blocks0to2"]["act_clips"]
    np.testing.assert_allclose(clips[1:, 0], [states[0].max(), states[1].max()], rtol=1e-5)
    _, new = quantize(model, variables, [x], Bits(4, None), weights="absmax", bias_correction=False)
    block = new["params"]["stage1"]["block0"]
    for i, kernel in enumerate(("kernel1", "kernel2", "shortcut_kernel")):
        np.testing.assert_allclose(block["weight_clips"][0, i], jnp.abs(block[kernel]).max(), rtol=1e-6)


def test_a_stream_of_batches_gives_the_clips_of_one_batch():
    model, variables = trained(symmetric=False)
    parts = [images(8, seed=4), images(8, seed=5)]
    options = {"activations": "percentile", "bias_correction": False}
    streamed = quantize(model, variables, parts, Bits(4, 4), **options)[1]
    whole = quantize(model, variables, [jnp.concatenate(parts)], Bits(4, 4), **options)[1]
    first = quantize(model, variables, parts[:1], Bits(4, 4), **options)[1]
    for stage in ("stage0", "stage1"):
        for name in streamed["params"][stage]:
            a, b, c = (v["params"][stage][name]["act_clips"] for v in (streamed, whole, first))
            np.testing.assert_allclose(a, b, rtol=1e-3)  # a value may round to the neighbouring bin
            assert (jnp.abs(a - c) > 1e-3 * c).any()


def test_correction_gives_every_norm_the_moments_of_full_precision():
    model, variables = trained(symmetric=False)
    # Those that the running statistics are of: training normalises like evaluation, up to the variance's n - 1.
    batches = [STATISTICS]
    quantized, raw = quantize(model, variables, batches, Bits(3, 3), bias_correction=False)
    corrected = correct_bias(quantized, raw, batches, Bits(3, 3), exact=raw)

    # By hand for the first convolution: the norm's input in both networks, on all data.
    block = jax.tree.map(lambda leaf: leaf[0], raw["params"]["stage0"]["blocks0to2"])
    x = seen(model, variables, batches[0])["stage0"]["blocks0to2"]["act_clips"][0][0]
    xq = quantize_activation(x, block["act_clips"][0], 3)
    exact = qpde.operators.conv(x, block["kernel1"])
    rounded = qpde.operators.conv(xq, quantize_weight(block["kernel1"], block["weight_clips"][0], 3))
    old, new = (v["batch_stats"]["stage0"]["blocks0to2"]["norm1"] for v in (raw, corrected))
    axes = (0, 1, 2)
    np.testing.assert_allclose(new["mean"][0] - old["mean"][0], (rounded - exact).mean(axes), atol=2e-3)
    np.testing.assert_allclose(new["var"][0] / old["var"][0], rounded.var(axes) / exact.var(axes), rtol=5e-3)

    logits = [run(*pair, batches[0]) for pair in ((model, variables), (quantized, corrected), (quantized, raw))]
    np.testing.assert_allclose(logits[1].mean(0), logits[0].mean(0), atol=1e-4)
    assert relative_error(logits[1], logits[0]) < 0.8 * relative_error(logits[2], logits[0])


def test_one_clip_per_channel_rounds_weights_more_finely():
    model, variables = trained("mobilenetv2", symmetric=False)
    x = images(4, seed=3)
    rounded = {}
    for per_channel in (False, True):
        quantized, new = quantize(model, variables, [x], Bits(3, None), per_channel=per_channel, bias_correction=False)
        block = quantized.stages[1][0]
        params = jax.tree.map(lambda leaf: leaf[0], new["params"]["stage1"]["block0"])
        clips = block.split_weight_clips(params["weight_clips"])
        assert [c.shape for c in clips] == [(n,) if per_channel else () for n in (16 * 6, 16 * 6, 24)]
        rounded[per_channel] = [
            relative_error(quantize_weight(params[name], clip, 8 if is_depthwise(shape) else 3), params[name])
            for clip, (name, shape) in zip(clips, block.kernel_shapes().items(), strict=True)
        ]
        assert np.isfinite(run(quantized, new, x)).all()
    assert all(fine < coarse for fine, coarse in zip(rounded[True], rounded[False], strict=True))


def test_the_spectral_steps_stay_non_expansive_in_few_bits():
    quantized, variables = in_bits(3, norm="spectral", residual="precise")
    stage = variables["params"]["stage0"]["blocks1to2"]
    vectors = variables["spectral"]["stage0"]["blocks1to2"]["vector"]
    block = quantized.stages[0][1]
    for i in range(2):
        params, v = jax.tree.map(lambda leaf, i=i: leaf[i], (stage, vectors))
        kernel = quantize_weight(params["kernel1"], params["weight_clips"][0], 3)
        linear, _ = block.linear_pair({"kernel1": kernel})
        d = params["norm1"]["scale"][None, None, None]
        estimate = jnp.linalg.norm(d * linear(v))
        exact = qpde.norms.spectral_norm(
            lambda x, linear=linear, d=d: d * linear(x), v.shape, iterations=300, key=jax.random.key(0)
        )
        np.testing.assert_allclose(estimate, exact, rtol=1e-3)


# Graphs.


@functools.cache
def graph_network(name, **options):
    rng = np.random.default_rng(0)
    graph = graphs.from_edges(*rng.integers(0, 30, (2, 90)), num_nodes=30, nodes=rng.random((30, 12), np.float32))
    model = models.create(name, num_classes=4, width=16, layers=3, **options)
    return model, jax.jit(model.init)(jax.random.key(0), graph), graph


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pde_gcn", {"kernel_init": "orthogonal"}),
        ("pde_gcn", {"kernel_init": "orthogonal", "nonlinearity": "tanh"}),
        ("gcnii", {}),
        ("gat", {}),
    ],
)
def test_graph_networks_are_quantized_alike(name, options):
    model, variables, graph = graph_network(name, **options)
    exact = run(model, variables, graph)
    errors = {}
    for bits in (8, 4):
        quantized, new = quantize(model, variables, [graph], Bits(bits, bits), per_channel=True)
        assert new["params"]["layers"]["weight_clips"].shape == (3, 16)
        assert (new["params"]["layers"]["act_clips"] != variables["params"]["layers"]["act_clips"]).all()
        logits = run(quantized, new, graph)
        np.testing.assert_allclose(logits.mean(0), exact.mean(0), atol=1e-5)
        errors[bits] = relative_error(logits, exact)
    assert errors[8] < 0.03
    assert errors[8] < 0.5 * errors[4]


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "empty"),
        ({"batches": iter([0])}, "only once.*list"),
        ({"bits": Bits(1, 4)}, "bits.weights .=1. must be.*2 to 32"),
        ({"bits": Bits(4, (4, 4))}, "bits.activations"),
        ({"batches": [images(2) * jnp.nan]}, "stage0/blocks0to2/act_clips/0 are NaN"),
        ({"model": models.create("resnet20", num_classes=10, act_bits=4)}, "quantizers already.*activations=4"),
        ({"activations": "best"}, "unknown method 'best'"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(change, message):
    model, variables = trained(symmetric=False)
    arguments = {"model": model, "variables": variables, "batches": [images(2)], "bits": Bits(None, 4)} | change
    with pytest.raises(ValueError, match=message):
        quantize(**arguments)
