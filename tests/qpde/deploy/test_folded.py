"""A folded network is the fake-quantized one in whole numbers, in NumPy and in JAX."""

import numpy as np
import pytest
from folded_networks import KINDS, fake_quantized, flips, network

from qpde import Bits, deploy, models
from qpde.deploy.program import Affine, Conv, Kernel, Program, Quantize


def largest_code(folded, name):
    op = next(op for op in folded.ops if op.out == name)
    return op.high if isinstance(op, Quantize) else op.table[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_integers_are_the_fake_quantized_network(kind):
    model, variables, images = network(kind)
    folded = deploy.fold(model, variables)
    logits, codes = deploy.run_reference(folded, images)
    expected, values = fake_quantized(model, variables, images)
    assert codes.keys() == values.keys()
    differing = {
        name: int((np.abs(code / largest_code(folded, name) - values[name]) > 1e-5).sum())
        for name, code in codes.items()
    }
    # The fake-quantized network sums in float32, so that a value at a threshold may fall to its other side. Then all
    # that follows differs; up to there all codes are equal.
    first = next((count for count in differing.values() if count), 0)
    assert first <= 2, differing
    if not first:
        np.testing.assert_allclose(logits, expected, atol=2e-6 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize(
    "kind", ["plain", "tied", "huber", "apot", "stable", "inverted", "inverted symmetric", "W3A32"]
)
def test_the_jax_network_has_the_codes_of_the_reference(kind):
    model, variables, images = network(kind)
    folded = deploy.fold(model, variables)
    logits, codes = deploy.run_reference(folded, images)
    found, found_codes = deploy.run(folded, return_codes=True)(images)
    assert flips(codes, found_codes) == 0
    np.testing.assert_allclose(found, logits, atol=3e-6)


def test_blocks_may_have_bits_of_their_own():
    model, variables, images = network()
    count = len(model.blocks)
    bits = Bits((4, 2, *[4] * (count - 2)), (4, 8, *[4] * (count - 2)))
    folded = deploy.fold(model, variables, bits=bits)
    assert [(n.weight_bits, n.act_bits) for n in folded.notes[1:3]] == [(4, 4), (2, 8)]
    assert np.abs(folded.kernels["block1.kernel1"].values).max() == 1
    assert deploy.run_reference(folded, images)[1]["block1.q0"].max() > 15


def test_clips_of_each_width_are_chosen():
    model, variables, images = network(clip_bits=(2, 4))
    folded = deploy.fold(model, variables, bits=Bits(2, 2))
    single = deploy.fold(*model.at_bits(variables, Bits(2, 2)))
    np.testing.assert_array_equal(deploy.run_reference(folded, images)[0], deploy.run_reference(single, images)[0])


def test_a_symmetric_block_holds_one_kernel():
    model, variables, _ = network()
    folded = deploy.fold(model, variables)
    uses = [op.adjoint for op in folded.ops if isinstance(op, Conv) and op.kernel == "block1.kernel1"]
    assert uses == [False, True]
    assert folded.kernels["block1.kernel1"].values.dtype == np.int8


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tied", "D of the tied norm varies"),
        ("spectral", "D of the spectral norm varies"),
        ("per channel", "the clip of each channel varies"),
        ("precise", "precise shortcut"),
        ("huber", "huber smoothing"),
        ("stable", "average before the next quantizer"),
        ("pot", "pass 2^24"),
        ("W3A32", "activations are not rounded"),
    ],
)
def test_the_summary_says_what_stays_in_float32_and_why(kind, reason):
    folded = deploy.fold(*network(kind)[:2])
    assert reason in str(folded)


def test_a_symmetric_network_with_separate_norms_is_integers_between_its_ends():
    folded = deploy.fold(*network()[:2], outer_bits=8)
    assert all(not note.in_float for note in folded.notes if note.part.startswith("block"))
    assert not next(note for note in folded.notes if note.part == "stem").in_float


def test_outer_kernels_of_8_bits_change_the_logits_little():
    model, variables, images = network()
    logits = deploy.run_reference(deploy.fold(model, variables, bits=Bits(8, 8)), images)[0]
    rounded = deploy.run_reference(deploy.fold(model, variables, bits=Bits(8, 8), outer_bits=8), images)[0]
    assert 0 < np.abs(rounded - logits).max() < 0.1 * np.abs(logits).max()


def test_a_sum_beyond_2_to_the_24_is_named_and_computed_in_int32():
    kernel = Kernel(np.full((3, 3, 512, 4), 127, np.int8), 8)
    ops = (
        Quantize("q", "images", 0, 255),
        Conv("sums", "q", "k", padding=1),
        Affine("logits", ("sums",), (np.ones((), np.float32),), np.zeros(4, np.float32)),
    )
    program = Program(ops, {"k": kernel})
    assert deploy.accumulator_bound(program) == {"sums": 127 * 255 * 9 * 512}
    folded = deploy.Folded(ops, {"k": kernel}, "wide", 512, 4, 1, ())
    assert "pass 2^24" in folded.summary()
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 3, 512)).astype(np.float32)
    # Logits are read at the first pixel.
    np.testing.assert_array_equal(deploy.run(folded)(images), deploy.run_reference(folded, images)[0])


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_bound_of_sums_is_reached_and_never_passed(adjoint):
    rng = np.random.default_rng(1)
    kernel = Kernel(rng.integers(-7, 8, (3, 3, 2, 3)).astype(np.int8), 4)
    ops = (Quantize("q", "images", -3, 5), Conv("sums", "q", "k", padding=1, adjoint=adjoint))
    low, high = deploy.whole_bounds(Program(ops, {"k": kernel}))["sums"]
    values = (kernel.adjoint() if adjoint else kernel.values).astype(int).reshape(-1, 2 if adjoint else 3)
    assert high == max((np.maximum(v * 5, v * -3)).sum() for v in values.T)
    assert low == min((np.minimum(v * 5, v * -3)).sum() for v in values.T)


def test_bad_arguments_are_refused():
    model, variables, images = network()
    with pytest.raises(ValueError, match="outer_bits=4 must be 8"):
        deploy.fold(model, variables, outer_bits=4)
    with pytest.raises(ValueError, match=r"use qpde\.deploy\.fold_graph"):
        deploy.fold(models.create("gcn", num_classes=2), {})
    folded = deploy.fold(model, variables)
    for run in (deploy.run(folded), lambda x: deploy.run_reference(folded, x)):
        with pytest.raises(ValueError, match=r"must be \(N, H, W, 3\)"):
            run(images[..., :2])
        with pytest.raises(ValueError, match="float64 must be float32"):
            run(images.astype(np.float64))
        with pytest.raises(ValueError, match="too small"):
            run(images[:, :1])
