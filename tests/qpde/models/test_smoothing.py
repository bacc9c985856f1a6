"""Smoothing inside networks whose scale is learned or scheduled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpde
from qpde import models
from qpde.models.layers import Mode

BOUND = qpde.stencils.max_stable_step(eps=0.1)
FIRST_AND_LAST = models.Smoothing(gamma2=0.02, blocks=(0, 2), output=True)  # the last one shares a group with block 1
LEARNED = dataclasses.replace(FIRST_AND_LAST, learned=True)


@functools.cache
def make(smoothing):
    """The first stage of resnet20: a plain block, and two symmetric ones that are stacked."""
    model = models.create("resnet20", num_classes=3, smoothing=smoothing)
    model = model.clone(architecture=model.architecture.with_blocks(len(model.stages[0])))
    return model, jax.jit(model.init)(jax.random.key(0), images())


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 8, 8, 3))


@functools.partial(jax.jit, static_argnames="model")
def states_of(model, variables):
    return model.apply(variables, images(), return_states=True)[1]


def eager_states(model, variables):
    with jax.disable_jit():
        return states_of(model, variables)


def path_name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def with_gamma2(variables, value):
    def replaced(path, leaf):
        return jnp.full_like(leaf, value) if path[-1].key == "gamma2" else leaf

    return {**variables, "params": jax.tree.map_with_path(replaced, variables["params"])}


def test_blocks_that_smooth_own_a_gamma2_and_start_as_the_network_that_learns_none():
    (fixed, plain), (learned, variables) = make(FIRST_AND_LAST), make(LEARNED)
    own = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(variables)}
    gamma2 = {name: own.pop(f"params/stage0/{name}/gamma2") for name in ("block0", "blocks1to2")}
    assert gamma2 == {"block0": (1,), "blocks1to2": (2,)}
    assert own == {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(plain)}
    assert fixed.ranges == {}
    assert learned.ranges == {f"stage0/{name}/gamma2": (0.0, BOUND) for name in ("block0", "blocks1to2")}

    for a, b in zip(states_of(fixed, plain), states_of(learned, variables), strict=True):
        np.testing.assert_array_equal(a, b)
    gamma2 = [step[-1] for step in learned.steps(with_gamma2(variables, 0.005))]
    assert (float(gamma2[0]), gamma2[1], float(gamma2[2])) == (np.float32(0.005), None, np.float32(0.005))

    counts = [models.summary(model, (8, 8, 3)).parameters for model in (fixed, learned)]
    assert counts[1] - counts[0] == 3
    only_last, _ = make(dataclasses.replace(LEARNED, blocks=(2,)))
    counts.append(models.summary(only_last, (8, 8, 3)).parameters)
    assert counts[2] - counts[0] == 2  # nobody in the group of block 0 smooths
    assert list(only_last.ranges) == ["stage0/blocks1to2/gamma2"]
    assert [step[0].smoothing is None for step in only_last.steps(with_gamma2(variables, 0.005))] == [True, True, False]


def test_the_gradient_of_gamma2_is_the_difference_quotient_and_leads_back_from_both_ends_of_its_range():
    model, variables = make(LEARNED)
    states = states_of(model, variables)
    block, own, step_size, _ = model.steps(variables)[2]
    weights = jax.random.normal(jax.random.key(1), states[1].shape)

    @jax.jit
    @jax.value_and_grad
    def value_and_slope(gamma2):
        return jnp.vdot(weights, block(own, states[1], step_size, qpde.Bits(), Mode(), gamma2)[0])

    (low, _), (_, slope), (high, _) = (value_and_slope(jnp.float32(gamma2)) for gamma2 in (0.009, 0.01, 0.011))
    np.testing.assert_allclose(slope, (high - low) / 0.002, rtol=1e-2)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(model.apply({**variables, "params": params}, images()) ** 2)

    for end in (0.0, BOUND):
        found = gradient(with_gamma2(variables, end)["params"])["stage0"]
        assert float(found["block0"]["gamma2"][0]) != 0
        np.testing.assert_array_equal(found["blocks1to2"]["gamma2"] != 0, [False, True])


@pytest.mark.parametrize("smoothing", [FIRST_AND_LAST, LEARNED])
def test_at_scale_zero_a_network_does_not_smooth_and_at_one_it_is_itself_bit_for_bit(smoothing):
    model, variables = make(smoothing)
    assert set(variables) == {"params", "batch_stats"}

    def at(scale):
        return variables | {"smoothing": {"scale": jnp.float32(scale)}}

    off, half, full = (states_of(model, at(scale)) for scale in (0.0, 0.5, 1.0))
    for pair in zip(full, states_of(model, variables), strict=True):
        np.testing.assert_array_equal(*pair)
    # Op by op: compiled as a whole, another program has its own last digits.
    for pair in zip(eager_states(model, at(0.0)), eager_states(*make(None)), strict=True):
        np.testing.assert_array_equal(*pair)
    assert bool((half[0] != full[0]).any() & (half[0] != off[0]).any())

    # What takes the network step by step sees the scale, too.
    gamma2 = [step[-1] for step in model.steps(at(0.5))]
    assert (float(gamma2[0]), gamma2[1], float(gamma2[2])) == (np.float32(0.01), None, np.float32(0.01))


def test_every_width_of_an_elastic_network_has_the_scale():
    model, variables = make(LEARNED)
    variables = variables | {"smoothing": {"scale": 0.0}}
    elastic, widths = qpde.measure.Elastic(model), [qpde.Bits(4, 4), qpde.Bits(4, 32)]
    bits = qpde.bits.stack_bits(widths)
    found = jax.jit(lambda v: elastic.apply(v, images(), bits=bits))(elastic.variables(variables, bits))
    plain, without = make(None)
    alone = jax.jit(lambda bits: plain.apply(without, images(), bits=bits))
    for logits, own in zip(found, widths, strict=True):
        np.testing.assert_allclose(logits, alone(jax.tree.map(jnp.int32, own)), rtol=1e-4, atol=1e-4)
