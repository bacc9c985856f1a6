"""`compare` and `reestimate_statistics` against plain NumPy, on a network small enough to write out twice."""

import itertools
import json
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpde import graphs, models
from qpde.bits import Bits
from qpde.measure import compare_bits, confusion_matrix, intersection_over_union
from qpde.measure.faithfulness import compare, reestimate_statistics

BITS = Bits(weights=4, activations=4)
CLASSES = 5
BLOCKS = 3
TRACES = Counter()


def quantize(x, bits, clip=2.0):
    """The unsigned activation quantizer, clipping only from 16 bits on."""
    n = 2.0 ** jnp.asarray(bits, jnp.float32) - 1
    clipped = jnp.clip(x, 0, clip)
    return jnp.where(bits >= 16, clipped, jnp.round(clipped / clip * n) / n * clip)


class Chain(nn.Module):
    """Three quantized dense blocks with batch norm, a head, and the calling conventions of qpde.models."""

    @nn.compact
    def __call__(self, x, *, train=False, return_states=False, bits=None, momentum=0.9):
        TRACES["train" if train else "evaluate"] += 1
        x, states = x.reshape(len(x), -1), []
        for i in range(BLOCKS):
            bits_here = bits.activations if jnp.ndim(bits.activations) == 0 else bits.activations[i]
            x = nn.Dense(8, name=f"dense{i}")(quantize(x, bits_here))
            x = nn.BatchNorm(use_running_average=not train, momentum=momentum, name=f"norm{i}")(x)
            states.append(x)
        logits = nn.Dense(CLASSES, name="head")(jax.nn.relu(x))
        return (logits, tuple(states)) if return_states else logits


MODEL = Chain()
VARIABLES = MODEL.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), bits=BITS)
VARIABLES = {**VARIABLES, "spectral": {"v": jnp.ones(3)}}


def data(seed, samples):
    rng = np.random.default_rng(seed)
    images = rng.normal(0.7, 1.0, (samples, 2, 2, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, samples)


def split(images, labels, size):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


@jax.jit
def forward(variables, images, bits):
    return MODEL.apply(variables, images, train=False, return_states=True, bits=bits)


def run(images, bits, variables=VARIABLES):
    logits, states = forward(variables, images, bits)
    return np.asarray(logits, np.float64), [np.asarray(s, np.float64) for s in states]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_compare(images, labels, bits, twin=VARIABLES):
    z_q, states_q = run(images, bits)
    z, states = run(images, Bits(weights=bits.weights, activations=32), twin)
    p, q = softmax(z), softmax(z_q)
    ordered = np.sort(z, axis=1)
    return {
        "samples": len(images),
        "accuracy": np.mean(z_q.argmax(1) == labels),
        "accuracy_twin": np.mean(z.argmax(1) == labels),
        "agreement": np.mean(z.argmax(1) == z_q.argmax(1)),
        "margin": np.mean(ordered[:, -1] - ordered[:, -2]),
        "kl": np.mean(np.sum(p * np.log(p / q), axis=1)),
        "logit_error": np.sqrt(np.mean((z - z_q) ** 2)),
        "layer_error": [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(states, states_q, strict=True)],
        "layer_rms": [np.sqrt(np.mean(a**2)) for a in states],
    }


def assert_equal(measured, expected):
    """Float32 forward passes of different batch sizes and sums: 1e-5 relative, more where values cancel."""
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(measured, name), value, rtol=2e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(measured.relative_layer_error, measured.layer_error / measured.layer_rms, rtol=1e-12)


# Fewer than a batch, one, one and a bit, two and a half.
@given(seed=st.integers(0, 2**31), samples=st.sampled_from([1, 16, 17, 40]), bits=st.integers(2, 8))
def test_every_number_is_its_formula_whatever_the_number_of_samples(seed, samples, bits):
    images, labels = data(seed, samples)
    bits = Bits(weights=4, activations=bits)
    assert_equal(compare(MODEL, VARIABLES, split(images, labels, 16), bits), numpy_compare(images, labels, bits))


def test_batches_of_any_sizes_give_the_same_numbers():
    images, labels = data(1, 40)
    whole = compare(MODEL, VARIABLES, [(images, labels)], BITS)
    ragged = [(images[a:b], labels[a:b]) for a, b in [(0, 1), (1, 17), (17, 20), (20, 40)]]
    parts = compare(MODEL, VARIABLES, iter(ragged), BITS)
    assert whole.iou is parts.iou is None
    for name, value in vars(whole).items():
        if value is not None:
            np.testing.assert_allclose(getattr(parts, name), value, rtol=1e-5, err_msg=name)


def test_one_compilation_serves_both_networks_all_widths_and_a_short_last_batch():
    images, labels = data(2, 24)
    before = TRACES["evaluate"]
    for bits in (2, 4, 8):
        compare(MODEL, VARIABLES, split(images, labels, 10), Bits(weights=4, activations=bits))
    assert TRACES["evaluate"] <= before + 1


def test_rounding_nothing_is_perfectly_faithful():
    images, labels = data(3, 20)
    result = compare(MODEL, VARIABLES, split(images, labels, 10), Bits(weights=4, activations=32))
    assert result.agreement == 1
    assert result.accuracy == result.accuracy_twin
    assert result.kl == result.logit_error == result.mean_layer_error == result.mean_relative_layer_error == 0


def test_more_bits_are_more_faithful():
    images, labels = data(4, 64)
    errors = [
        compare(MODEL, VARIABLES, split(images, labels, 64), Bits(4, b)).mean_relative_layer_error
        for b in (2, 3, 4, 6, 8)
    ]
    # Each bit halves the step of the rounding, and so nearly the error.
    assert all(fine < 0.75 * coarse for coarse, fine in itertools.pairwise(errors))


def test_relative_error_does_not_see_the_scale_of_the_activations():
    images, _ = data(5, 32)
    small = jax.tree.map(lambda v: v, VARIABLES)
    # The last block has no quantizer behind it: its scale is free.
    small["params"]["norm2"] = jax.tree.map(lambda v: v / 8, small["params"]["norm2"])
    a, b = compare(MODEL, VARIABLES, [images], BITS), compare(MODEL, small, [images], BITS)
    np.testing.assert_allclose(b.layer_error[-1], a.layer_error[-1] / 8, rtol=1e-5)
    np.testing.assert_allclose(b.relative_layer_error, a.relative_layer_error, rtol=1e-5)


def test_images_without_labels_have_no_accuracy_and_all_else():
    images, labels = data(6, 20)
    result = compare(MODEL, VARIABLES, [images[:10], jnp.asarray(images[10:])], BITS)
    assert result.accuracy is result.accuracy_twin is None
    expected = numpy_compare(images, labels, BITS)
    assert_equal(result, {k: v for k, v in expected.items() if "accuracy" not in k})


def test_bits_may_be_arrays_with_one_value_per_block():
    images, labels = data(7, 16)
    bits = Bits(weights=4, activations=np.array([8, 2, 4], np.int32))
    assert_equal(compare(MODEL, VARIABLES, [(images, labels)], bits), numpy_compare(images, labels, bits))


def test_dead_blocks_keep_the_relative_error_finite():
    images, _ = data(8, 8)
    dead = jax.tree.map(jnp.zeros_like, VARIABLES)
    result = compare(MODEL, dead, [images], BITS)
    np.testing.assert_array_equal(result.relative_layer_error, np.zeros(BLOCKS))


def test_result_survives_json():
    images, labels = data(9, 8)
    result = compare(MODEL, VARIABLES, [(images, labels)], BITS)
    loaded = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert loaded["layer_error"] == result.layer_error.tolist()
    assert loaded["mean_layer_error"] == np.mean(result.layer_error)
    assert loaded["mean_relative_layer_error"] == np.mean(result.relative_layer_error)
    assert loaded["samples"] == 8


def numpy_statistics(batches, bits):
    """Mean over batches, weighted by size, of each norm's own statistics."""
    total = sum(len(x) for x in batches)
    found = {f"norm{i}": {"mean": 0, "var": 0} for i in range(BLOCKS)}
    for x in batches:
        x_in = np.reshape(x, (len(x), -1))
        for i in range(BLOCKS):
            dense = VARIABLES["params"][f"dense{i}"]
            y = np.asarray(quantize(jnp.asarray(x_in), bits)) @ np.asarray(dense["kernel"])
            mean, var = y.mean(0), y.var(0)
            found[f"norm{i}"]["mean"] += mean * len(x) / total
            found[f"norm{i}"]["var"] += var * len(x) / total
            x_in = (y - mean) / np.sqrt(var + 1e-5)
    return found


def test_statistics_are_the_means_of_the_batches_own():
    images, labels = data(10, 40)
    batches = [images[:16], (images[16:32], labels[16:32]), images[32:]]
    fresh = reestimate_statistics(MODEL, VARIABLES, iter(batches), BITS)
    expected = numpy_statistics([images[:16], images[16:32], images[32:]], 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fresh["batch_stats"], expected)
    for kept in ("params", "spectral"):
        jax.tree.map(np.testing.assert_array_equal, fresh[kept], VARIABLES[kept])


def test_statistics_of_both_networks_are_estimated_from_the_same_batches_each_at_its_own_bits():
    images, labels = data(11, 32)
    twin = reestimate_statistics(MODEL, VARIABLES, [images], Bits(weights=4, activations=32))
    low = reestimate_statistics(MODEL, VARIABLES, [images], BITS)
    given_ready = compare(MODEL, VARIABLES, [(images, labels)], BITS, twin=twin)
    assert_equal(given_ready, numpy_compare(images, labels, BITS, twin))
    estimated = compare(MODEL, VARIABLES, [(images, labels)], BITS, statistics_batches=iter([images]))
    again = compare(MODEL, low, [(images, labels)], BITS, twin=twin)
    assert estimated.as_dict() == again.as_dict()
    assert estimated.mean_layer_error != given_ready.mean_layer_error


def test_estimating_twice_from_the_same_data_changes_nothing():
    images, _ = data(12, 32)
    once = reestimate_statistics(MODEL, VARIABLES, [images[:16], images[16:]], BITS)
    twice = reestimate_statistics(MODEL, once, [images[:16], images[16:]], BITS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), once, twice)


def test_network_without_statistics_is_returned_as_it_is():
    variables = {"params": {"kernel": jnp.ones(2)}}
    assert reestimate_statistics(MODEL, variables, [], BITS) is variables


@pytest.mark.parametrize(
    ("batches", "bits", "message"),
    [
        ([data(0, 8)], Bits(weights=4, activations=None), r"`bits.activations` \(=None\)"),
        ([data(0, 8)], None, r"`bits.activations` \(=None\)"),
        ([], BITS, "nothing to compare"),
        ([data(0, 8), data(0, 0)], BITS, "batch 1 holds no images"),
        ([data(0, 8), data(0, 8)[0]], BITS, "batch 1 has no labels"),
        ([data(0, 8)[0], data(0, 8)], BITS, "batch 1 has labels"),
        ([(data(0, 8)[0], np.arange(7))], BITS, "one for each of its 8 images"),
        ([(data(0, 8)[0], np.zeros(8))], BITS, "float64 of shape"),
        ([(data(0, 8)[0], np.full(8, 5))], BITS, "from 5 to 5; they must lie in 0 to 4"),
        ([(data(0, 8)[0], np.arange(8) % 5 - 1)], BITS, "from -1 to 3; they must lie in 0 to 4"),
        ([np.full((8, 2, 2, 3), np.nan, np.float32)], BITS, r"block 0 \(of 0 to 2\) are NaN .* in batch 0"),
    ],
)
def test_bad_input_is_named(batches, bits, message):
    with pytest.raises(ValueError, match=message):
        compare(MODEL, VARIABLES, batches, bits)


@pytest.mark.parametrize(("layer", "message"), [("dense1", "block 1"), ("head", "logits are NaN")])
def test_nan_in_the_weights_is_located(layer, message):
    broken = jax.tree.map(lambda v: v, VARIABLES)
    broken["params"][layer]["bias"] = jnp.full_like(broken["params"][layer]["bias"], jnp.nan)
    with pytest.raises(ValueError, match=message):
        compare(MODEL, broken, [data(0, 8)], BITS)


def test_no_batches_for_the_statistics_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        compare(MODEL, VARIABLES, [data(0, 8)], BITS, statistics_batches=[])


def test_real_network_is_compared_block_by_block():
    model = models.create("stablenet20", num_classes=10, weight_bits=4, act_bits=4)
    images = np.random.default_rng(0).normal(size=(12, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(images[:1]))
    batches = [images[:8], images[8:]]
    fresh = reestimate_statistics(model, variables, [images[:8]], model.bits)
    rough = compare(model, fresh, batches, model.bits._replace(activations=3))
    fine = compare(model, fresh, batches, model.bits._replace(activations=8))
    exact = compare(model, fresh, batches, model.bits._replace(activations=32))
    assert len(rough.layer_error) == len(model.blocks)
    assert np.all(rough.layer_error > fine.layer_error)
    assert np.all(fine.layer_error > 0)
    assert exact.mean_layer_error == exact.kl == 0


def graph_and_labels(labels):
    edges = np.array([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 5]])
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    return graphs.from_edges(*edges, num_nodes=6, nodes=features), np.array(labels)


GRAPH_MODEL = models.create("pde_gcn", num_classes=2, layers=2, width=4)


def test_on_a_graph_nodes_are_the_samples_and_the_label_minus_one_does_not_count():
    graph, labels = graph_and_labels([0, 1, -1, -1, 1, -1])
    variables = GRAPH_MODEL.init(jax.random.key(0), graph)
    result = compare(GRAPH_MODEL, variables, [(graph, labels)], BITS)
    counted = np.flatnonzero(labels >= 0)
    logits, states = GRAPH_MODEL.apply(variables, graph, return_states=True, bits=Bits(4, 32))
    logits_q, states_q = GRAPH_MODEL.apply(variables, graph, return_states=True, bits=BITS)
    assert result.samples == 3
    assert result.accuracy == np.mean(np.argmax(logits_q, 1)[counted] == labels[counted])
    assert result.agreement == np.mean((np.argmax(logits_q, 1) == np.argmax(logits, 1))[counted])
    error = [np.sqrt(np.mean(np.square(a - b)[counted])) for a, b in zip(states, states_q, strict=True)]
    np.testing.assert_allclose(result.layer_error, error, rtol=1e-5)
    everything = compare(GRAPH_MODEL, variables, [graph], BITS)
    assert everything.samples == 6
    assert everything.accuracy is None


def test_labels_of_nodes_outside_the_classes_are_refused():
    graph, labels = graph_and_labels([0, 1, -1, -1, 2, -1])
    variables = GRAPH_MODEL.init(jax.random.key(0), graph)
    with pytest.raises(ValueError, match="run from -1 to 2; they must lie in -1 to 1"):
        compare(GRAPH_MODEL, variables, [(graph, labels)], BITS)
    with pytest.raises(ValueError, match="no label counts"):
        compare(GRAPH_MODEL, variables, [(graph, np.full(6, -1))], BITS)


class Segmenter(nn.Module):
    """Two quantized convolutions and logits for every pixel."""

    @nn.compact
    def __call__(self, x, *, train=False, return_states=False, bits=None):
        states = []
        for i in range(2):
            x = nn.relu(nn.Conv(4, (3, 3), name=f"conv{i}")(quantize(x, bits.activations)))
            states.append(x)
        logits = nn.Dense(CLASSES, name="head")(x)
        return (logits, tuple(states)) if return_states else logits


def test_a_segmentation_network_is_compared_pixel_by_pixel_and_the_label_minus_one_does_not_count():
    model, rng = Segmenter(), np.random.default_rng(0)
    images = rng.normal(0.7, 1.0, (5, 6, 4, 3)).astype(np.float32)
    labels = rng.integers(-1, CLASSES, (5, 6, 4))
    labels[0] = -1
    variables = model.init(jax.random.key(0), images[:1], bits=BITS)
    result = compare(model, variables, split(images, labels, 2), BITS)

    z, states = model.apply(variables, images, bits=Bits(4, 32), return_states=True)
    z_q, states_q = model.apply(variables, images, bits=BITS, return_states=True)
    counted, chosen, chosen_q = labels >= 0, z.argmax(-1), z_q.argmax(-1)
    assert result.samples == 5
    np.testing.assert_allclose(result.accuracy, np.mean((chosen_q == labels)[counted]))
    np.testing.assert_allclose(result.accuracy_twin, np.mean((chosen == labels)[counted]))
    np.testing.assert_allclose(result.agreement, np.mean((chosen == chosen_q)[counted]))
    assert 0.5 < result.agreement < 1
    for found, predictions in ((result.iou, chosen_q), (result.iou_twin, chosen)):
        counts = confusion_matrix(labels, predictions, num_classes=CLASSES)
        np.testing.assert_allclose(found, intersection_over_union(counts))
    assert result.as_dict()["mean_iou"] == result.mean_iou == np.mean(result.iou)
    assert compare(model, variables, [images], BITS).iou is None
    # At several bits, each beside itself at 32 bits, and beside itself.
    several = compare_bits(model, variables, split(images, labels, 2), [BITS, BITS], references=[Bits(4, 32), BITS])
    np.testing.assert_allclose(several.iou, [result.iou] * 2)
    np.testing.assert_allclose(several.iou_reference, [result.iou_twin, result.iou])
    np.testing.assert_allclose(several.mean_iou, [result.mean_iou] * 2)
    p, q = (np.asarray(jax.nn.softmax(v)) for v in (z, z_q))
    np.testing.assert_allclose(result.kl, np.mean(np.sum(p * np.log(p / q), -1)), rtol=1e-4)
    np.testing.assert_allclose(result.logit_error, np.sqrt(np.mean((z - z_q) ** 2)), rtol=1e-5)
    error = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(states, states_q, strict=True)]
    np.testing.assert_allclose(result.layer_error, error, rtol=1e-5)
    everything = compare(model, variables, [images], BITS)
    np.testing.assert_allclose(everything.agreement, np.mean(chosen == chosen_q))
    with pytest.raises(ValueError, match=r"shape \(5, 6\).*shape \(5, 6, 4\)"):
        compare(model, variables, [(images, labels[..., 0])], BITS)
