"""One set of weights at many widths, against the same network called width by width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpde import graphs, models, quantizers
from qpde.bits import Bits, stack_bits
from qpde.certify.certificate import certify
from qpde.certify.step_bounds import step_bounds
from qpde.measure.bit_widths import Elastic, compare_bits
from qpde.measure.faithfulness import compare, reestimate_statistics
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock

WIDTHS = [Bits(2, 2), Bits(3, 4), Bits(8, 8), Bits(32, 32)]


def data(seed, samples):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, 8, 8, 1)).astype(np.float32), rng.integers(0, 4, samples)


IMAGES, LABELS = data(0, 20)
BATCHES = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:16], LABELS[8:16]), (IMAGES[16:], LABELS[16:])]


@pytest.fixture(scope="module")
def trained():
    """A network of two blocks in which everything differs from its start, and its variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ARCHITECTURES, "tiny", Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1),)))
        model = models.create("tiny", num_classes=4, weight_bits=4, act_bits=4)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(IMAGES[:8]))
    variables = models.calibrate_clips(model, variables, jnp.asarray(IMAGES[:8]), train=True)
    return model, reestimate_statistics(model, variables, [IMAGES[:8]], model.bits)


def test_each_width_is_measured_as_if_it_were_alone(trained):
    model, variables = trained
    result = compare_bits(model, variables, BATCHES, WIDTHS)
    assert result.samples == 20
    for i, bits in enumerate(WIDTHS):
        alone = compare(model, variables, BATCHES, bits)
        assert result.accuracy[i] == alone.accuracy
        assert result.accuracy_reference[i] == alone.accuracy_twin
        assert result.agreement[i] == alone.agreement
        np.testing.assert_allclose(result.kl[i], alone.kl, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(result.logit_error[i], alone.logit_error, rtol=1e-4, atol=1e-7)
    assert result.logit_error[0] > result.logit_error[2] > result.logit_error[3] == 0


def test_every_width_and_reference_gets_its_own_batch_statistics(trained):
    model, variables = trained
    statistics = [data(1, 8)[0], data(2, 8)[0]]
    result = compare_bits(model, variables, BATCHES, WIDTHS[:2], statistics_batches=iter(statistics))
    for i, bits in enumerate(WIDTHS[:2]):
        own = reestimate_statistics(model, variables, statistics, bits)
        alone = compare(model, own, BATCHES, bits, statistics_batches=statistics)
        np.testing.assert_allclose(result.kl[i], alone.kl, rtol=1e-3)
        np.testing.assert_allclose(result.logit_error[i], alone.logit_error, rtol=1e-4)


def test_a_reference_may_be_any_width_and_its_error_is_that_of_the_logits(trained):
    model, variables = trained
    result = compare_bits(model, variables, BATCHES, WIDTHS, references=[WIDTHS[3]] * 3 + [WIDTHS[0]])
    logits = [np.asarray(model.apply(variables, jnp.asarray(IMAGES), bits=bits), np.float64) for bits in WIDTHS]
    expected = [np.sqrt(np.mean((logits[i] - logits[j]) ** 2)) for i, j in ((0, 3), (1, 3), (2, 3), (3, 0))]
    np.testing.assert_allclose(result.logit_error, expected, rtol=1e-4)
    np.testing.assert_array_equal(
        result.agreement[:2], [np.mean(logits[i].argmax(1) == logits[3].argmax(1)) for i in (0, 1)]
    )
    assert result.accuracy_reference[0] == result.accuracy[3]


def test_widths_may_differ_from_block_to_block(trained):
    model, variables = trained
    rows = [Bits(4, 4), Bits(jnp.array([2, 32]), jnp.array([32, 3]))]
    result = compare_bits(model, variables, BATCHES, rows)
    alone = compare(model, variables, BATCHES, rows[1])
    np.testing.assert_allclose(result.logit_error[1], alone.logit_error, rtol=1e-4)


def test_all_widths_share_one_compiled_program_which_other_widths_and_a_short_batch_use_too(trained, monkeypatch):
    model, variables = trained
    traced, apply = [], Elastic.apply

    def counted(self, *arguments, **options):
        traced.append(options["train"])
        return apply(self, *arguments, **options)

    monkeypatch.setattr(Elastic, "apply", counted)
    fresh = model.with_options(act_bits=5)  # compiled nowhere else
    for widths in (WIDTHS, [Bits(3, 2), Bits(5, 5), Bits(7, 6), Bits(32, 32)]):
        compare_bits(fresh, variables, BATCHES, widths, statistics_batches=[IMAGES[:8]])
    assert traced == [True, False]


def test_a_graph_is_measured_the_same_way():
    graph = graphs.from_edges(
        np.array([0, 1, 2]), np.array([1, 2, 3]), num_nodes=4, nodes=np.eye(4, 3, dtype=np.float32)
    )
    labels = np.array([0, 1, -1, 1])
    model = models.create("pde_gcn", num_classes=2, layers=2, width=4)
    variables = model.init(jax.random.key(0), graph)
    result = compare_bits(model, variables, [(graph, labels)], WIDTHS[:2], statistics_batches=[])
    alone = compare(model, variables, [(graph, labels)], WIDTHS[1])
    assert (result.samples, result.accuracy[1]) == (3, alone.accuracy)
    np.testing.assert_allclose(result.logit_error[1], alone.logit_error, rtol=1e-4)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([], "there are no bits"),
        ([Bits(4, None)], r"`bits.activations` \(=None\)"),
        ([Bits(4, 4), Bits(4, 1)], r"bits of activations \(=1\) must be a whole number from 2 to 32"),
        ([Bits(2.5, 4)], r"bits of weights \(=2.5\)"),
        ([Bits(4, 33)], r"\(=33\)"),
        ([Bits(4, 4), Bits(None, 4)], "some weights have bits and others None"),
        ([Bits(4, jnp.array([2, 3])), Bits(4, jnp.array([2, 3, 4]))], r"shapes \[\(2,\), \(3,\)\]"),
    ],
)
def test_widths_that_are_not_supported_are_named(trained, bits, message):
    with pytest.raises(ValueError, match=message):
        compare_bits(*trained, BATCHES, bits)


def test_other_bad_input_is_named(trained):
    model, variables = trained
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_bits(model, variables, [], WIDTHS)
    with pytest.raises(ValueError, match="1 references for 4 widths"):
        compare_bits(model, variables, BATCHES, WIDTHS, references=[Bits(4, 4)])
    with pytest.raises(ValueError, match="logits are NaN or infinite in batch 0"):
        compare_bits(model, variables, [np.full((8, 8, 8, 1), np.nan, np.float32)], WIDTHS)
    with pytest.raises(ValueError, match=r"bits.weights has shape \(3,\)"):
        compare_bits(model, variables, BATCHES, [Bits(jnp.array([2, 3, 4]), 4)])


def test_stacked_widths_keep_their_order_and_spread_common_ones_over_the_blocks():
    stacked = stack_bits([Bits(None, 4), Bits(None, np.array([2, 3]))])
    assert stacked.weights is None
    np.testing.assert_array_equal(stacked.activations, [[4, 4], [2, 3]])
    assert stack_bits([Bits(2, 3)]).weights.shape == (1,)


@pytest.fixture(scope="module")
def own_clips(trained):
    """The same network with clips for 2, 4 and 32 bits, read off the data at each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ARCHITECTURES, "tiny", Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1),)))
        model = models.create("tiny", num_classes=4, weight_bits=4, act_bits=4, clip_bits=(2, 4, 32))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(IMAGES[:8]))
    variables = models.calibrate_clips(model, variables, jnp.asarray(IMAGES[:8]), train=True)
    return model, reestimate_statistics(model, variables, [IMAGES[:8]], model.bits)


@pytest.mark.parametrize("bits", [Bits(2, 2), Bits(2, 4), Bits(4, 32), Bits(3, 2), Bits(32, None), Bits(None, 4)])
def test_a_network_with_clips_for_each_width_is_at_each_an_ordinary_one(own_clips, bits):
    model, variables = own_clips
    ordinary, own = model.at_bits(variables, bits)
    assert ordinary.bits == bits
    assert ordinary.clip_bits is None
    assert own["params"]["stage0"]["block0"]["act_clips"].shape == (1, 2)
    expected = model.apply(variables, jnp.asarray(IMAGES), bits=bits)
    np.testing.assert_allclose(ordinary.apply(own, jnp.asarray(IMAGES)), expected, rtol=1e-5, atol=1e-5)
    traced = jax.jit(lambda bits: model.apply(variables, jnp.asarray(IMAGES), bits=bits))(bits)
    np.testing.assert_allclose(traced, expected, rtol=1e-4, atol=1e-4)


def test_a_network_with_one_clip_for_all_widths_stays_as_it_is_at_any(trained):
    model, variables = trained
    ordinary, own = model.at_bits(variables, Bits(2, 8))
    assert ordinary == model.with_bits(Bits(2, 8))
    jax.tree.map(np.testing.assert_array_equal, own, variables)


def test_clips_of_each_width_fit_the_data_at_that_bits(own_clips):
    model, variables = own_clips
    params = variables["params"]["stage0"]["block0"]
    for i, width in enumerate(model.clip_bits):
        kernel = quantizers.standardize_weight(params["kernel1"][0])
        np.testing.assert_allclose(
            params["weight_clips"][0, i, 0],
            quantizers.initial_clip(kernel, width, signed=True, method="mse"),
            rtol=1e-4,
        )
    assert (jnp.diff(params["weight_clips"], axis=1) > 0).all()  # more levels reach further


def test_a_width_between_those_with_clips_takes_the_next_ones(own_clips):
    block, row_numbers = own_clips[0].blocks[0], jnp.arange(3.0)[:, None]
    rows = {"weight_clips": row_numbers, "act_clips": row_numbers}
    for width, row in ((2, 0), (3, 1), (4, 1), (5, 2), (32, 2), (None, 2)):
        at = block.clips_at(rows, Bits(width, 2))
        assert (at["weight_clips"], at["act_clips"]) == (row, 0)


def test_only_the_clips_of_the_width_that_runs_learn(own_clips):
    model, variables = own_clips

    def loss(params, bits):
        return jnp.mean(model.apply({**variables, "params": params}, jnp.asarray(IMAGES), bits=bits) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"], Bits(2, 4))["stage0"]
    for name, row in (("weight_clips", 0), ("act_clips", 1)):
        learns = jnp.abs(grads["block1"][name][0]).sum(-1) > 0
        np.testing.assert_array_equal(learns, np.arange(3) == row)


def test_clips_of_each_width_are_used_by_each_width_of_a_comparison(own_clips):
    model, variables = own_clips
    result = compare_bits(model, variables, BATCHES, [Bits(2, 2), Bits(4, 4)], references=[Bits(32, 32)] * 2)
    for i, width in enumerate((2, 4)):
        ordinary, own = model.at_bits(variables, Bits(width, width))
        low = ordinary.apply(own, jnp.asarray(IMAGES))
        ordinary, own = model.at_bits(variables, Bits(32, 32))
        error = jnp.sqrt(jnp.mean((low - ordinary.apply(own, jnp.asarray(IMAGES))) ** 2))
        np.testing.assert_allclose(result.logit_error[i], error, rtol=1e-4)


@pytest.mark.parametrize("widths", [(), (4, 2), (4, 4), (1, 2), (4, 33)])
def test_widths_that_cannot_have_clips_are_refused(widths):
    with pytest.raises(ValueError, match="clip_bits must be ascending whole numbers from 2 to 32"):
        models.create("resnet20", num_classes=4, weight_bits=4, act_bits=4, clip_bits=widths)


def test_clips_for_widths_need_quantizers_and_a_certificate_one_width(own_clips):
    with pytest.raises(ValueError, match="need quantizers"):
        models.create("resnet20", num_classes=4, clip_bits=(2, 4))
    model, variables = own_clips
    with pytest.raises(ValueError, match=r"certify `model.at_bits\(variables, bits\)`"):
        certify(model, variables, IMAGES, Bits(4, 4))
    with pytest.raises(ValueError, match=r"certify `model.at_bits\(variables, bits\)`"):
        step_bounds(model, variables, (8, 8), Bits(4, 4))
    found = certify(*model.at_bits(variables, Bits(4, 4)), IMAGES, Bits(4, 4))
    assert found.logits.shape == (20, 4)
