"""Integrators: order, stability up to the proven bounds and failure beyond, one result for every loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpde.integrators import SCAN_FROM, euler, hamiltonian, integrate, leapfrog, midpoint, rk4
from qpde.testing import check_non_expansive

SEEDS = st.integers(0, 2**31 - 1)
NONLINEARITIES = {  # all monotone with slope at most 1
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "huber": lambda x: jnp.clip(x, -1.0, 1.0),
}


def sine(x, _):
    return jnp.sin(x)


def stacked_layers(length, seed=0, width=5):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(length, width, width)), jnp.float32) / width**0.5,
        "bias": jnp.asarray(rng.normal(size=(length, width)), jnp.float32),
    }


def symmetric_field(x, params):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None, :]) @ params["kernel"].T


def order(error, count):
    """Observed order of a scheme whose error after `count` steps is given."""
    return np.log2(error(count) / error(2 * count))


# ---- order of convergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "expected", "count"), [(euler, 1, 64), (midpoint, 2, 16), (rk4, 4, 4)])
def test_one_step_schemes_converge_with_their_order(scheme, expected, count):
    # x' = -sin x from 1 is 2 atan(e^-t tan 1/2). So few steps that float32 rounding (1e-7) does not show.
    def error(count):
        x = integrate(partial(scheme, sine), None, jnp.float32(1.0), step_size=jnp.full(count, 2.0 / count))
        return abs(float(x) - 2 * np.arctan(np.tan(0.5) * np.exp(-2.0)))

    assert order(error, count) == pytest.approx(expected, abs=0.35)


def test_leapfrog_converges_with_order_two():
    def error(count):  # x'' = -x from (1, 0) is cos t; the state before the start is exact
        h = 2.0 / count
        start = (jnp.float32(1.0), jnp.float32(np.cos(h)))
        x, _ = integrate(partial(leapfrog, lambda x, _: x), None, start, step_size=jnp.full(count, h))
        return abs(float(x) - np.cos(2.0))

    assert order(error, 10) == pytest.approx(2, abs=0.1)


def pendulum(*, steps, h):
    """Angle y, momentum z: y' = z, z' = -sin y, energy z^2/2 - cos y; starts at rest at angle 1."""
    step = partial(hamiltonian, lambda z, _: -z, lambda y, _: jnp.sin(y))

    def record(state, params, step_size):
        state = step(state, params, step_size)
        return state, state

    start = (jnp.float32(1.0), jnp.float32(0.0))
    return integrate(record, None, start, step_size=jnp.full(steps, h), has_aux=True)


def test_symplectic_euler_converges_with_order_one():
    (reference, _), _ = pendulum(steps=4096, h=2.0 / 4096)
    error = lambda count: abs(float(pendulum(steps=count, h=2.0 / count)[0][0] - reference))  # noqa: E731
    assert order(error, 32) == pytest.approx(1, abs=0.15)


def test_symplectic_euler_keeps_the_energy_for_ten_thousand_steps_where_euler_does_not():
    h = 0.05
    _, (angle, momentum) = pendulum(steps=10_000, h=h)
    drift = momentum**2 / 2 - jnp.cos(angle) + np.cos(1.0)
    # The modified energy H + h/2 sin(y) z is conserved, so H stays within h/2 * max|sin(y) z| <= h/2.
    assert float(jnp.max(jnp.abs(drift))) <= h / 2

    field = lambda state, _: (-state[1], jnp.sin(state[0]))  # noqa: E731
    start = (jnp.float32(1.0), jnp.float32(0.0))
    y, z = integrate(partial(euler, field), None, start, step_size=jnp.full(10_000, h))
    assert float(z**2 / 2 - jnp.cos(y) + np.cos(1.0)) > 1.0


# ---- stability ---------------------------------------------------------------------------------------------


@jax.jit
def random_map(seed, scale):
    return scale * jax.random.normal(jax.random.key(seed), (7, 5))


@pytest.mark.parametrize("name", NONLINEARITIES)
@given(
    seed=SEEDS,
    scale=st.floats(0.01, 100.0),
    fraction=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    size=st.sampled_from([0.01, 1.0]),
    hardest=st.booleans(),
)
def test_symmetric_euler_is_non_expansive_up_to_the_bound(name, seed, scale, fraction, size, hardest):
    s = NONLINEARITIES[name]
    kernel = random_map(seed, scale)
    _, singular, right = np.linalg.svd(np.asarray(kernel, np.float64))
    rng = np.random.default_rng(seed)
    # Along the top singular vector, where s has slope 1, the bound is attained.
    start, offset = rng.normal(size=5), right[0] if hardest else rng.normal(size=5)
    x, y = (jnp.asarray(point * size / scale, jnp.float32) for point in (start, start + offset))
    step = partial(euler, lambda x, k: k.T @ s(k @ x))
    before = float(jnp.linalg.norm(x - y))
    h = float(fraction * 2 / singular[0] ** 2)
    after = float(jnp.linalg.norm(step(x, kernel, h) - step(y, kernel, h)))
    magnitude = float(jnp.linalg.norm(x) + jnp.linalg.norm(y))
    assert after <= before + 4e-6 * magnitude  # about thirty float32 roundings of the states


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_the_worst_direction_of_symmetric_euler_grows_beyond_the_bound_and_not_at_it(name):
    s, kernel = NONLINEARITIES[name], random_map(0, 1.0)
    square = np.linalg.norm(np.asarray(kernel, np.float64), 2) ** 2

    def step(h):
        return partial(euler, lambda x, k: k.T @ s(k @ x), params=kernel, step_size=h)

    check_non_expansive(step(float(2 / square)), (5,))
    if name != "relu":  # of which some channels are off, so that its slope may be less than |K|^2 everywhere
        with pytest.raises(AssertionError, match="expansive"):
            check_non_expansive(step(float(2.1 / square)), (5,))


@jax.jit
def wave(kernel, x, h):
    step = partial(leapfrog, lambda x, k: k.T @ (k @ x))
    return integrate(lambda state, _, h: step(state, kernel, h), None, (x, x), step_size=jnp.full(500, h))


@given(seed=SEEDS)
def test_leapfrog_is_stable_below_its_bound_and_not_beyond(seed):
    kernel = random_map(seed, 1.0)
    _, singular, right = np.linalg.svd(np.asarray(kernel, np.float64))
    x = jnp.asarray(right[0] + right[1], jnp.float32)  # always includes the fastest mode
    stable, _ = wave(kernel, x, jnp.float32(np.sqrt(3.6) / singular[0]))
    # An oscillation of h w = 2 asin(sqrt(.9)) started at rest has amplitude 1 / cos(h w / 2) = 3.2 at most.
    assert float(jnp.max(jnp.abs(stable))) < 4.6
    unstable, _ = wave(kernel, x, jnp.float32(np.sqrt(4.2) / singular[0]))
    assert not float(jnp.max(jnp.abs(unstable))) < 1e6


waves = jax.jit(partial(integrate, partial(leapfrog, symmetric_field), step_size=0.3))


@given(seed=SEEDS)
def test_leapfrog_runs_backwards(seed):
    params = stacked_layers(6, seed)
    rng = np.random.default_rng(seed)
    start = tuple(jnp.asarray(rng.normal(size=(2, 5)), jnp.float32) for _ in range(2))
    x, previous = waves(params, start)
    back_previous, back = waves(jax.tree.map(lambda p: p[::-1], params), (previous, x))
    # Six steps forward and six back round a hundred-odd times at magnitude about ten.
    np.testing.assert_allclose(back, start[0], atol=2e-4)
    np.testing.assert_allclose(back_previous, start[1], atol=2e-4)


@given(seed=SEEDS)
def test_the_hamiltonian_step_is_symplectic(seed):
    kernel = stacked_layers(1, seed, width=3)["kernel"][0]
    step = partial(hamiltonian, lambda z, k: -(k.T @ jnp.tanh(k @ z)), lambda y, k: jnp.sinh(k.T @ y) @ k.T)
    flat = lambda v: jnp.concatenate(step((v[:3], v[3:]), kernel, 0.4))  # noqa: E731
    point = jnp.asarray(np.random.default_rng(seed).normal(size=6), jnp.float32)
    jacobian = np.asarray(jax.jacobian(flat)(point), np.float64)
    omega = np.block([[np.zeros((3, 3)), np.eye(3)], [-np.eye(3), np.zeros((3, 3))]])
    scale = np.abs(jacobian).max() ** 2
    np.testing.assert_allclose(jacobian.T @ omega @ jacobian, omega, atol=1e-6 * scale + 1e-6)


# ---- one result for every kind of loop ---------------------------------------------------------------------

LOOPS = [("scan", False), ("scan", True), ("unroll", False), ("unroll", True), ("auto", False)]


def coupled_field(state, layer):
    """A vector field on a state of two leaves."""
    return {"u": symmetric_field(state["v"], layer), "v": symmetric_field(state["u"], layer)}


def coupled_step(state, layer, step_size):
    state = euler(coupled_field, state, layer, step_size)
    return state, jnp.sum(state["u"] * state["v"])


def steps_by_hand(params, state, sizes):
    records = []
    for j, h in enumerate(sizes):
        slope = coupled_field(state, {name: stack[j] for name, stack in params.items()})
        state = {name: state[name] - h * slope[name] for name in state}
        records.append(jnp.sum(state["u"] * state["v"]))
    return state, jnp.stack(records)


def values_and_gradients(run, length):
    """Final state, records, and the gradients of a scalar of both in everything that goes in."""

    def loss(params, state, sizes):
        final, records = run(params, state, sizes)
        return jnp.sum(final["u"] ** 2) + jnp.sum(final["v"] ** 3) + jnp.sum(records), (final, records)

    state = {"u": jnp.ones((2, 5)), "v": jnp.linspace(-1.0, 1.0, 10).reshape(2, 5)}
    arguments = (stacked_layers(length), state, jnp.linspace(0.1, 0.3, length))
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments))


@pytest.mark.parametrize("length", [1, SCAN_FROM + 1])
def test_values_and_gradients_do_not_depend_on_the_loop(length):
    expected = values_and_gradients(steps_by_hand, length)
    for loop, remat in LOOPS:
        options = {"loop": loop, "remat": remat, "has_aux": True}

        def run(params, state, sizes, options=options):
            return integrate(coupled_step, params, state, step_size=sizes, **options)

        for a, b in zip(values_and_gradients(run, length), expected, strict=True):
            # Gradients sum some hundred products in another order.
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{loop}, remat={remat}")


@pytest.mark.parametrize("scheme", [euler, midpoint, rk4])
def test_jit_and_vmap_equal_eager(scheme):
    params = stacked_layers(SCAN_FROM)
    states = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 5)), jnp.float32)
    run = lambda x, h: integrate(partial(scheme, symmetric_field), params, x, step_size=h)  # noqa: E731
    eager = jnp.stack([run(x, 0.2) for x in states])
    np.testing.assert_allclose(jax.jit(run)(states[0], 0.2), eager[0], rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(run, (0, None))(states, jnp.float32(0.2))
    np.testing.assert_allclose(mapped, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_scalar_step_size_means_the_same_one_at_every_step(loop):
    params, x = stacked_layers(3), jnp.ones((2, 5))
    run = partial(integrate, partial(euler, symmetric_field), params, x, loop=loop)
    np.testing.assert_array_equal(run(step_size=0.25), run(step_size=jnp.full(3, 0.25)))
    np.testing.assert_array_equal(run(step_size=1), run(step_size=jnp.float32(1.0)))


def test_auto_scans_exactly_from_the_named_length_on():
    def primitives(length, loop):
        run = lambda p, x: integrate(partial(euler, symmetric_field), p, x, step_size=0.1, loop=loop)  # noqa: E731
        return {str(e.primitive) for e in jax.make_jaxpr(run)(stacked_layers(length), jnp.ones((2, 5))).eqns}

    assert "scan" not in primitives(SCAN_FROM - 1, "auto")
    assert "scan" in primitives(SCAN_FROM, "auto")
    assert "scan" in primitives(1, "scan")
    assert "scan" not in primitives(SCAN_FROM, "unroll")


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_parameters_may_hold_random_keys(loop):
    keys = jax.random.split(jax.random.key(0), 3)
    noisy = lambda x, key, h: x + h * jax.random.normal(key, x.shape)  # noqa: E731
    expected = sum(np.asarray(jax.random.normal(key, (4,))) for key in keys)
    got = integrate(noisy, keys, jnp.zeros(4), step_size=1.0, loop=loop)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # three terms in another order


def test_remat_stores_states_only():
    state, wide = 4096, 64  # a step's intermediate is that many times larger than the state

    def field(x, weights):
        return jnp.mean(jnp.tanh(x[:, None] * weights[None, :]), axis=1)

    def temporary_bytes(steps, remat):
        loss = lambda p, x: jnp.sum(integrate(partial(euler, field), p, x, step_size=0.1, remat=remat))  # noqa: E731
        program = jax.jit(jax.grad(loss)).lower(jnp.ones((steps, wide)), jnp.ones(state))
        return program.compile().memory_analysis().temp_size_in_bytes

    # What eight more steps cost, in float32 numbers of a step: the rest is the space that one step works in.
    kept, recomputed = ((temporary_bytes(16, remat) - temporary_bytes(8, remat)) / 32 for remat in (False, True))
    assert kept >= state * wide
    assert recomputed < 4 * state


# ---- refusals ----------------------------------------------------------------------------------------------


def run_euler(params, **options):
    return integrate(partial(euler, sine), params, jnp.ones(2), **{"step_size": 0.1, **options})


def test_stacks_of_different_lengths_are_refused_by_name():
    with pytest.raises(ValueError, match=r"params\['a'\]: \(3, 2\), params\['b'\]: \(4, 2\)"):
        run_euler({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"params: \(3, 2\), step_size: \(4,\)"):
        run_euler(jnp.ones((3, 2)), step_size=jnp.ones(4))
    for params in ({"a": jnp.ones((3, 2)), "b": jnp.ones(())}, {"b": jnp.ones(())}):
        with pytest.raises(ValueError, match=r"leading axis, got .*params\['b'\]: \(\)"):
            run_euler(params)


def test_zero_or_unknown_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="length 0"):
        run_euler(jnp.ones((0, 2)))
    with pytest.raises(ValueError, match="number of steps is unknown"):
        run_euler(None)


def test_a_step_size_of_higher_rank_is_refused():
    with pytest.raises((ValueError, TypeError), match="step_size"):
        run_euler(jnp.ones((3, 2)), step_size=jnp.ones((3, 2)))


def test_an_unknown_loop_is_refused():
    with pytest.raises(ValueError, match="'while'"):
        run_euler(jnp.ones((3, 2)), loop="while")


# ---- dtypes ------------------------------------------------------------------------------------------------


def linear(x, _):
    return jax.tree.map(lambda leaf: 0.5 * leaf, x)


SCHEMES = {
    "euler": (partial(euler, linear), False),
    "midpoint": (partial(midpoint, linear), False),
    "rk4": (partial(rk4, linear), False),
    "leapfrog": (partial(leapfrog, linear), True),
    "hamiltonian": (partial(hamiltonian, linear, linear), True),
    "a wide field": (partial(euler, lambda x, _: x.astype(jnp.float32)), False),
    "a step of one's own": (lambda x, _, h: x.astype(jnp.float32) * (1 - 0.5 * h), False),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_state_keeps_its_dtype_whatever_the_loop_and_the_step_size(scheme, dtype):
    step, is_pair = SCHEMES[scheme]
    x = jnp.arange(1.0, 4.0).astype(dtype)
    state = (x, x) if is_pair else x
    for step_size in (0.25, jnp.float32(0.25), jnp.full(4, 0.25), np.float32(0.25)):
        for loop in ("scan", "unroll"):
            found = integrate(step, jnp.zeros(4), state, step_size=step_size, loop=loop)
            assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [dtype] * (1 + is_pair)
    wide = integrate(step, jnp.zeros(4), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state), step_size=0.25)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_whole_number_in_the_state_stays_one_or_is_refused(loop):
    def count(state, _, h):
        x, steps = state
        return x - h * x, steps + 1

    _, steps = integrate(count, jnp.zeros(5), (jnp.ones(2), jnp.int32(0)), step_size=jnp.float32(0.1), loop=loop)
    assert steps == 5
    assert steps.dtype == jnp.int32
    with pytest.raises(ValueError, match="a step makes float32 of a state of int32"):
        integrate(partial(euler, lambda x, _: jnp.sin(x)), jnp.zeros(5), jnp.arange(3), step_size=0.1, loop=loop)
