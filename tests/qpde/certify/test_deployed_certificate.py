"""The certificate of what is deployed: integer programs, settled ones and others, against the twin itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_certificate import SEEDS, both, images, network

from qpde import Bits, deploy
from qpde.certify import certify, exact_twin

KINDS = ["separate", "plain", "spectral, precise"]


def deployed(model, variables, x, bits, *, outer_bits=None, settle=False):
    folded = deploy.fold(model, variables, bits=bits, outer_bits=outer_bits)
    folded = deploy.settle(folded) if settle else folded
    logits, _, states = deploy.run_reference(folded, np.asarray(x), return_states=True)
    return logits, states


def check(model, variables, x, bits, run, newton_steps=2):
    """Every claim of the certificate against the twin; the certificate and the true differences."""
    logits, states = run
    found = certify(model, variables, x, bits, newton_steps=newton_steps, deployed=run)
    _, (_, states_twin) = both(model, variables, x, Bits(*map(jnp.int32, bits)))
    moved = [np.sqrt(np.square(a - b).sum((1, 2, 3))) for a, b in zip(states[1:], states_twin, strict=True)]
    assert (np.stack(moved, 1) <= found.state_bound * (1 + 1e-4) + 1e-5).all()
    twin, i = exact_twin(model, variables, x, bits), np.argmax(logits, -1)
    np.testing.assert_array_equal(found.prediction, i)
    margins = [np.take_along_axis(z, i[:, None], 1) - z for z in (np.float64(logits), twin)]
    difference = np.abs(margins[0] - margins[1])
    assert (difference <= found.bound + 1e-9 * np.abs(twin).max()).all()
    assert (np.argmax(twin, -1) == i)[found.certified].all()
    assert not found.certified_a_priori.any()
    others = np.arange(twin.shape[1]) != i[:, None]
    assert np.isinf(found.bound_a_priori[others]).all()
    assert (found.bound_a_priori[~others] == 0).all()
    return found, difference


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, phases=[Phase.generate])
@given(
    seed=SEEDS,
    bits=st.tuples(st.integers(2, 8), st.sampled_from([2, 4, 8])),
    outer_bits=st.sampled_from([None, 8]),
    settle=st.booleans(),
    newton_steps=st.sampled_from([None, 0, 2]),
)
def test_no_deployed_answer_moves_by_more_than_its_bound(kind, seed, bits, outer_bits, settle, newton_steps):
    model, init = network(kind)
    key, bits = jax.random.key(seed), Bits(*bits)
    variables, x = init(key), images(4, jax.random.fold_in(key, 1))
    check(model, variables, x, bits, deployed(model, variables, x, bits, outer_bits=outer_bits, settle=settle))


def test_states_are_those_of_the_fake_quantized_network():
    model, init = network("plain")
    variables, x, bits = init(jax.random.key(0)), images(4, jax.random.key(1)), Bits(4, 8)
    logits, states = deployed(model, variables, x, bits)
    expected, kept = model.apply(variables, x, bits=bits, return_states=True)
    # In 8 bits a code that lies at a threshold is one of 255.
    for state, own in zip(states[1:], kept, strict=True):
        np.testing.assert_allclose(state, own, atol=0.02 * np.abs(own).max())
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())
    found, own = (
        check(model, variables, x, bits, (logits, states))[0],
        certify(model, variables, x, bits, newton_steps=2),
    )
    np.testing.assert_allclose(found.bound, own.bound, rtol=0.1, atol=1e-3)


def test_enough_newton_steps_leave_the_difference_and_a_settled_network_is_certified():
    model, init = network("spectral, precise")
    variables, x, bits = init(jax.random.key(0)), images(8, jax.random.key(1)), Bits(4, 8)
    run = deployed(model, variables, x, bits, outer_bits=8, settle=True)
    found, difference = check(model, variables, x, bits, run, newton_steps=4)
    np.testing.assert_allclose(found.bound, difference, rtol=1e-6, atol=1e-9)
    assert found.certified_fraction == 1
    assert check(model, variables, x, bits, run)[0].certified_fraction >= 0.75


def test_whatever_the_states_are_the_bound_holds():
    """Defects are measured, not assumed: those of a broken program make the bound worse and not false."""
    model, init = network("plain")
    variables, x, bits = init(jax.random.key(0)), images(4, jax.random.key(1)), Bits(4, 4)
    logits, states = deployed(model, variables, x, bits)
    bounds = [check(model, variables, x, bits, (logits, states), 0)[0].bound]
    rng = np.random.default_rng(0)
    for size in (0.01, 0.3):
        noisy = [s + size * np.abs(s).max() * rng.standard_normal(s.shape).astype(np.float32) for s in states]
        bounds.append(check(model, variables, x, bits, (logits, noisy), 0)[0].bound)
    assert bounds[0].sum() < bounds[1].sum() < bounds[2].sum()
    wrong = np.roll(logits, 1, axis=-1)  # another answer is not the twin's
    found, _ = check(model, variables, x, bits, (wrong, states), 4)
    assert not found.certified[np.argmax(wrong, -1) != np.argmax(exact_twin(model, variables, x, bits), -1)].any()


def test_states_of_another_network_are_refused():
    model, init = network("plain")
    variables, x, bits = init(jax.random.key(0)), images(2, jax.random.key(1)), Bits(4, 4)
    logits, states = deployed(model, variables, x, bits)
    for run in ((logits, states[1:]), (logits[:, :3], states), (logits, [s[:1] for s in states])):
        with pytest.raises(ValueError, match="`deployed` has values of shape"):
            certify(model, variables, x, bits, deployed=run)
