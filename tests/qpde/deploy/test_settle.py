"""After settling, no float evaluation can flip a code."""

import numpy as np
import pytest
from folded_networks import flips, network

from qpde import deploy
from qpde.deploy.program import Affine, Conv
from qpde.deploy.settle import _middle, _roundings


def safe(folded):
    return {m.name: m.is_safe for m in deploy.margins(folded)}


@pytest.mark.parametrize("kind", ["symmetric", "plain", "W2A2", "inverted"])
def test_every_threshold_of_few_bits_is_away_from_every_sum(kind):
    model, variables, _ = network(kind)
    folded = deploy.fold(model, variables, outer_bits=8)
    assert not all(safe(folded).values())
    settled = deploy.settle(folded)
    assert all(safe(settled).values()), deploy.margins(settled)
    assert settled.settled
    assert not folded.settled


def test_every_reachable_sum_has_one_code_however_it_is_rounded():
    settled = deploy.settle(deploy.fold(*network()[:2], outer_bits=8))
    bounds, checked = deploy.whole_bounds(settled), 0
    for rounding in _roundings(settled):
        (name,) = rounding.affine.inputs
        if name == "images":
            continue
        low, high = bounds[name]
        sums = np.arange(low, high + 1, max(1, (high - low) // 200_000))
        for m, b in zip(rounding.affine.factors[0][:4], rounding.affine.bias[:4], strict=True):
            exact = sums * float(m) + float(b)  # both factors fit a float64 product
            plain = sums.astype(np.float32) * m + b
            other = ((sums + float(b) / float(m)) * float(m)).astype(np.float32)
            codes = [np.clip(np.rint(v), rounding.low, rounding.high) for v in (exact, plain, other)]
            np.testing.assert_array_equal(codes[0], codes[1])
            np.testing.assert_array_equal(codes[0], codes[2])
            checked += 1
    assert checked >= 16


def test_a_bias_alone_moves_without_changing_a_code():
    model, variables, images = network()
    folded = deploy.fold(model, variables)
    settled = deploy.settle(folded)
    _, before = deploy.run_reference(folded, images)
    _, after = deploy.run_reference(settled, images)
    assert flips({"block0.q0": before["block0.q0"]}, {"block0.q0": after["block0.q0"]}) == 0  # a float stem: as it was
    assert flips({"block0.q1": before["block0.q1"]}, {"block0.q1": after["block0.q1"]}) == 0  # one sum, its bias moved


def test_factors_move_by_less_than_a_hundredth():
    folded = deploy.fold(*network("plain")[:2])
    settled = deploy.settle(folded)
    made = {op.out: op for op in settled.ops}
    for op in folded.ops:
        if not isinstance(op, Affine) or made[op.out] is op or op.bias is None:
            continue
        new = made[op.out]
        whole = made.get(new.inputs[0])
        factors = new.factors if isinstance(whole, Conv) else [new.factors[0] * f for f in whole.factors]
        for old, moved in zip(op.factors, factors, strict=True):
            np.testing.assert_allclose(moved, np.broadcast_to(old, moved.shape), rtol=0.016)


def test_8_bits_have_no_room_and_say_so():
    folded = deploy.settle(deploy.fold(*network("W8A8")[:2], outer_bits=8))
    assert not all(safe(folded).values())
    real = {m.name: m.reason for m in deploy.margins(deploy.fold(*network("precise")[:2]))}
    assert real["block1.q0"] == "real numbers arrive"


def test_a_bias_moves_to_the_middle_of_its_interval():
    # Thresholds at 4.7 and 14.7: the codes stay while they are between 4 and 5, and 14 and 15.
    assert _middle(0.1, 0.03, np.array([0.5, 1.5]), (-100, 100)) == pytest.approx(0.05)
    # One that no sum reaches does not count: only 4.7 does.
    assert _middle(0.1, 0.03, np.array([0.5, 1.58]), (-8, 8)) == pytest.approx(0.05)
