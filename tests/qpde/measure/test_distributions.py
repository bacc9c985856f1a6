"""`distributions` against NumPy, on what the quantizers of small networks of images and of graphs are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpde import graphs, models
from qpde.bits import Bits
from qpde.measure.distributions import distribution, distributions
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from qpde.quantizers import quantize_activation

BITS = Bits(weights=4, activations=3)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(10, 8, 8, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    """Four blocks, two of which are equal and so stacked, with clips that cut off some values."""
    registry.ARCHITECTURES["four"] = Architecture("tiny", BasicBlock, ((4, 4, 3, 1, 1), (4, 6, 1, 2, 1)))
    model = models.create("four", num_classes=3, weight_bits=4, act_bits=3)
    del registry.ARCHITECTURES["four"]
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    return model, models.calibrate_clips(model, variables, IMAGES, train=True)


def rounded_values(model, variables, x, bits):
    """By block and quantizer of activations, what is rounded: the whole arrays, as the blocks report them."""

    def observe(x, clip, quantizer):
        return (None if quantizer.is_weight else (x, clip)), clip

    observed = model.apply(variables, x, bits=bits, observe=observe, mutable=["observed"])[1]["observed"]
    if "layers" in observed:
        stacks = [observed["layers"]]
    else:
        stacks = [observed["stage0"]["block0"], observed["stage0"]["blocks1to2"], observed["stage1"]["block0"]]
    return [
        [(np.asarray(x[i], np.float64), float(clip[i])) for x, clip in stack["act_clips"]]
        for stack in stacks
        for i in range(len(stack["act_clips"][0][1]))
    ]


def check(found, values, bits, *, signed, deviations):
    """Every field is its formula; sums in float32 over a few thousand numbers: 1e-5, more where they cancel."""
    assert [(d.block, d.index) for d in found] == [(b, i) for b in range(len(values)) for i in range(len(values[b]))]
    for d in found:
        x, clip = values[d.block][d.index]
        rounded = np.asarray(quantize_activation(jnp.asarray(x, jnp.float32), clip, bits, signed=signed))
        shares = np.unique(rounded, return_counts=True)[1] / x.size
        assert (d.bits, d.signed, d.count) == (bits, signed, x.size)
        np.testing.assert_allclose(d.clip, clip, rtol=1e-6)
        np.testing.assert_allclose([d.mean, d.std], [x.mean(), x.std()], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(d.kurtosis, ((x - x.mean()) ** 4).mean() / x.var() ** 2, rtol=1e-4)
        assert d.saturated == np.mean((x > np.float32(clip)) | (x < (-np.float32(clip) if signed else 0)))
        np.testing.assert_allclose(d.level_shares, shares, rtol=1e-12)
        assert d.used_levels == len(shares)
        np.testing.assert_allclose(d.entropy, -(shares * np.log2(shares)).sum(), atol=1e-12)
        # A bin of the histogram is 1/512 of its values at most.
        width = np.diff(d.edges).max()
        assert width <= np.abs(x).max() / 512
        limit = deviations * x.std()
        outer, inner = (np.mean(np.abs(x - x.mean()) > limit + shift) for shift in (1.01 * width, -1.01 * width))
        assert outer <= d.outliers <= inner
        assert d.counts.sum() == x.size
        assert len(d.edges) == len(d.counts) + 1
        for edge in (d.edges[np.searchsorted(d.edges, 0)], d.edges[-50], np.median(d.edges)):
            below = d.counts[: np.searchsorted(d.edges, edge)].sum()
            assert np.sum(x < edge - 1e-6) <= below <= np.sum(x <= edge + 1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_every_number_is_its_formula_on_values(signed):
    x = RNG.normal(size=(3, 5, 7)).astype(np.float32)
    found = distribution(jnp.asarray(x), 0.8, bits=3, signed=signed, block=0, deviations=2.0)
    check([found], [[(np.asarray(x, np.float64), 0.8)]], 3, signed=signed, deviations=2.0)
    for options, message in (({"bits": 9}, "2 to 8"), ({"bits": 4, "deviations": 0.0}, "must be positive")):
        with pytest.raises(ValueError, match=message):
            distribution(jnp.asarray(x), 0.8, **options)
    with pytest.raises(ValueError, match="NaN or infinite"):
        distribution(jnp.full(3, jnp.nan), 0.8, bits=4)


def test_every_number_is_its_formula_on_images(network):
    model, variables = network
    values = rounded_values(model, variables, jnp.asarray(IMAGES), BITS)
    found = distributions(model, variables, [(IMAGES, np.zeros(10, np.int32))], BITS, deviations=2.0)
    assert len(found) == 8
    assert any(d.saturated > 0 for d in found)
    assert any(d.outliers > 0 for d in found)
    check(found, values, 3, signed=False, deviations=2.0)


def test_batches_of_any_sizes_give_the_same_distribution(network):
    model, variables = network
    whole = distributions(model, variables, [IMAGES], BITS)
    parts = distributions(model, variables, iter([IMAGES[:7], IMAGES[7:]]), BITS)
    for a, b in zip(whole, parts, strict=True):
        for name in ("count", "saturated", "used_levels"):
            assert getattr(a, name) == getattr(b, name)
        for name in ("mean", "std", "kurtosis", "entropy", "level_shares", "outliers", "counts", "edges"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6, err_msg=name)


def test_every_block_has_its_own_width(network):
    model, variables = network
    widths = np.array([2, 8, 3, 4], np.int32)
    found = distributions(model, variables, [IMAGES], Bits(4, widths))
    assert [d.bits for d in found] == [2, 2, 8, 8, 3, 3, 4, 4]
    assert all(d.used_levels <= 2**d.bits and 0 <= d.entropy <= d.bits for d in found)
    assert max(d.used_levels for d in found) > 16


@pytest.fixture(scope="module")
def graph_network():
    edges = np.array([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 5]])
    graph = graphs.from_edges(*edges, num_nodes=6, nodes=RNG.normal(size=(6, 3)).astype(np.float32))
    model = models.create(
        "pde_gcn", num_classes=2, layers=3, width=40, weight_bits=4, act_bits=3, nonlinearity="tanh", step_size=3.0
    )
    variables = jax.jit(model.init)(jax.random.key(0), graph)
    layers = variables["params"]["layers"]
    tight = {**layers, "act_clips": jnp.full_like(layers["act_clips"], 0.02)}
    return model, {"params": {**variables["params"], "layers": tight}}, graph


def test_every_number_is_its_formula_on_a_graph(graph_network):
    model, variables, graph = graph_network
    values = rounded_values(model, variables, graph, BITS)
    found = distributions(model, variables, [graph], BITS)
    assert len(found) == 6
    assert any((x < -clip).any() for block in values for x, clip in block), "or saturation below is not tested"
    check(found, values, 3, signed=True, deviations=4.0)


def test_a_constant_activation_has_one_level_and_no_outliers(network):
    model, variables = network
    dark = jax.tree.map(jnp.zeros_like, variables)
    dark = {**dark, "params": models.clips.replace_clips(variables, {})["params"]}
    stem = dark["params"]["stem"]
    dark["params"] = {**dark["params"], "stem": {**stem, "norm": jax.tree.map(jnp.zeros_like, stem["norm"])}}
    first = distributions(model, dark, [IMAGES], BITS)[0]
    assert (first.kurtosis, first.outliers, first.used_levels, first.entropy, first.std) == (0, 0, 1, 0, 0)


@pytest.mark.parametrize(
    ("batches", "bits", "options", "message"),
    [
        ([IMAGES], Bits(4, None), {}, r"`bits.activations` \(=None\): there are no quantizers"),
        ([IMAGES], Bits(4, 9), {}, "holds 9: levels are counted for 2 to 8 bits"),
        ([], BITS, {}, "`batches` is empty"),
        ([IMAGES[:0]], BITS, {}, "batch 0 holds no images"),
        ([IMAGES], BITS, {"deviations": 0.0}, r"`deviations` \(=0.0\)"),
        ([IMAGES, np.full_like(IMAGES, np.nan)], BITS, {}, r"quantizer 0 of block 0 \(of 0 to 3\) .* in batch 1"),
    ],
)
def test_bad_input_is_named(network, batches, bits, options, message):
    with pytest.raises(ValueError, match=message):
        distributions(*network, batches, bits, **options)
