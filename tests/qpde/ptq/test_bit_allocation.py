"""Allocation of widths against brute force, and the costs and sensitivities it is made from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpde import models
from qpde.bits import Bits
from qpde.measure.faithfulness import reestimate_statistics
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from qpde.ptq.bit_allocation import FULL, allocate, block_bits, block_costs, sensitivity

CHOICES = [Bits(2, 3), Bits(4, 4)]


@st.composite
def problems(draw, *, largest_cost=30):
    """Errors, costs (choices, blocks), and a budget that some allocation keeps."""
    choices, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, largest_cost), min_size=choices * blocks, max_size=choices * blocks)
    # Whole numbers, so that sums are exact and ties are common.
    errors = np.array(draw(numbers), np.float64).reshape(choices, blocks)
    costs = np.array(draw(numbers), np.int64).reshape(choices, blocks)
    least, most = costs.min(axis=0).sum(), costs.max(axis=0).sum()
    return errors, costs, int(draw(st.integers(least, most + 1)))


def total(table, chosen):
    return sum(table[c, j] for j, c in enumerate(chosen))


@given(problem=problems())
def test_the_allocation_keeps_the_budget_and_is_the_best_that_brute_force_finds(problem):
    errors, costs, budget = problem
    chosen = allocate(errors, costs, budget)
    every = itertools.product(range(len(errors)), repeat=errors.shape[1])
    best, cheapest = min((total(errors, c), total(costs, c)) for c in every if total(costs, c) <= budget)
    assert total(costs, chosen) <= budget
    assert (total(errors, chosen), total(costs, chosen)) == (best, cheapest)


@given(problem=problems(largest_cost=10**12), seed=st.integers(0, 2**31))
def test_it_is_never_worse_than_uniform_widths_within_the_budget(problem, seed):
    _, costs, budget = problem
    errors = np.random.default_rng(seed).exponential(size=costs.shape)
    chosen = allocate(errors, costs, budget)
    assert total(costs, chosen) <= budget
    for row, cost in zip(errors, costs, strict=True):
        if cost.sum() <= budget:
            assert total(errors, chosen) <= row.sum() * (1 + 1e-12)


def test_deep_networks_of_equal_blocks_are_allocated():
    rng = np.random.default_rng(0)
    costs = np.outer([4, 9, 16, 36, 64], np.ones(27, np.int64)).astype(np.int64) * 10**6
    errors = np.sort(rng.exponential(size=(5, 27)), axis=0)[::-1]
    chosen = allocate(errors, costs, 16 * 27 * 10**6)
    assert total(costs, chosen) <= 16 * 27 * 10**6
    assert total(errors, chosen) < errors[2].sum()


@pytest.mark.parametrize(
    ("errors", "costs", "budget", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 2), np.int64), 9, "must have the same shape"),
        (np.ones((0, 3)), np.ones((0, 3), np.int64), 9, "must have the same shape"),
        (np.full((1, 2), np.nan), np.ones((1, 2), np.int64), 9, "must be finite"),
        (np.ones((2, 2)), [[1.0, 1.0], [1.0, 1.0]], 9, "costs are float64: they must be whole numbers"),
        ([[1.0, 2.0], [2.0, 1.0]], [[1, 2], [2, 1]], float("nan"), r"budget \(=nan\) must be a number"),
        ([1.0, 2.0], [1, 2], 9, r"must have the same shape, \(choices, blocks\)"),
        (np.ones((2, 2)), np.array([[5, 6], [7, 4]]), 8, r"budget \(=8\) is below .* 9"),
    ],
)
def test_bad_input_is_named(errors, costs, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(errors, costs, budget)


def test_lists_are_allocated_as_arrays():
    errors, costs = [[3.0, 1.0], [0.5, 0.2]], [[1, 1], [4, 4]]
    assert allocate(errors, costs, 5) == allocate(np.array(errors), np.array(costs), 5.0) == (1, 0)


@pytest.fixture(scope="module")
def trained():
    """A network of two blocks, its variables and images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ARCHITECTURES, "tiny", Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1),)))
        model = models.create("tiny", num_classes=4, weight_bits=4, act_bits=4)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 1)), jnp.float32)
    variables = models.calibrate_clips(model, jax.jit(model.init)(jax.random.key(0), images), images, train=True)
    return model, reestimate_statistics(model, variables, [images], model.bits), images


def test_costs_are_those_of_the_summary_and_add_up(trained):
    model = trained[0]
    costs = block_costs(model, (8, 8, 1), CHOICES)
    mixed = models.summary(model, (8, 8, 1), bits=block_bits([CHOICES[1], CHOICES[0]]))
    assert [row.bit_operations for row in mixed.rows[1:3]] == [costs[1, 0], costs[0, 1]]
    macs = [row.macs for row in mixed.rows[1:3]]
    np.testing.assert_array_equal(costs, np.outer([6, 16], macs))


def test_sensitivity_rounds_one_block_and_leaves_the_others(trained):
    model, variables, images = trained
    found = sensitivity(model, variables, [images], CHOICES)
    exact = model.apply(variables, images, bits=FULL)
    assert found.kl.shape == found.agreement.shape == (2, 2)
    for c, j in itertools.product(range(2), range(2)):
        bits = block_bits([CHOICES[c] if i == j else FULL for i in range(2)])
        error = jnp.sqrt(jnp.mean((model.apply(variables, images, bits=bits) - exact) ** 2))
        np.testing.assert_allclose(found.logit_error[c, j], error, rtol=1e-3)
    assert np.all(found.kl[0] > found.kl[1])
    with pytest.raises(ValueError, match="two numbers each"):
        sensitivity(model, variables, [images], [Bits(jnp.array([2, 3]), 4)])
    with pytest.raises(ValueError, match="give 32"):
        sensitivity(model, variables, [images], [Bits(None, 4)])
