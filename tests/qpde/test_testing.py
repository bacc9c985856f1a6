"""The checks of qpde.testing find what they are for, and pass what is right."""

import builtins
from functools import partial

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from hypothesis import given

from qpde import graphs, quantizers, stencils, testing
from qpde.operators import conv, conv_adjoint

SHAPE = (2, 6, 5, 2)
KERNEL = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 2, 4)), jnp.float32)


def diffusion(x, *, gamma2):
    """An unchecked step of the heat equation, stable up to 1/4."""
    return x + jnp.float32(gamma2) * stencils.divergence(stencils.gradient(x))


def symmetric_step(x, *, square):
    """x - K^T tanh(K x), K scaled to |K|^2 = square by its dense matrix for this size of image."""
    scaled = KERNEL * jnp.float32(np.sqrt(square) / NORM)
    return x - conv_adjoint(jnp.tanh(conv(x, scaled)), scaled)


NORM = np.linalg.norm(
    np.asarray(jax.jacobian(lambda x: conv(x[None], KERNEL).ravel())(jnp.zeros(SHAPE[1:]))).reshape(120, 60), 2
)


def test_an_adjoint_passes_and_anything_else_is_found():
    testing.check_adjoint(partial(conv, kernel=KERNEL), partial(conv_adjoint, kernel=KERNEL), SHAPE)
    with pytest.raises(AssertionError, match="not adjoint: <A x, y>"):
        testing.check_adjoint(partial(conv, kernel=KERNEL), lambda y: conv(y, KERNEL.swapaxes(2, 3)), SHAPE)
    with pytest.raises(AssertionError, match=r"the adjoint maps .* but the map is from"):
        testing.check_adjoint(partial(conv, kernel=KERNEL), lambda y: y, SHAPE)
    with pytest.raises(AssertionError, match="not linear"):
        testing.check_adjoint(lambda x: x * jnp.abs(x) ** 2, lambda y: jnp.zeros_like(y), (3,), tolerance=2.0)


def test_a_step_within_its_bound_is_non_expansive_and_one_a_percent_beyond_is_found():
    testing.check_non_expansive(partial(symmetric_step, square=1.99), SHAPE)
    with pytest.raises(AssertionError, match="expansive"):
        testing.check_non_expansive(partial(symmetric_step, square=2.02), SHAPE)


def _projection(x):
    """Onto one direction, of many: random pairs hardly move along it."""
    u = jnp.ones(x.shape, jnp.float32) / jnp.sqrt(jnp.float32(x.size))
    return u * jnp.vdot(u, x)


def test_random_pairs_alone_do_not_find_one_bad_direction_of_many():
    step = jax.jit(lambda x: x - 2.02 * _projection(x))
    rng = np.random.default_rng(0)
    pairs = [[jnp.asarray(rng.standard_normal(500), jnp.float32) for _ in range(2)] for _ in range(20)]
    assert all(jnp.linalg.norm(step(x) - step(y)) <= jnp.linalg.norm(x - y) * 1.001 for x, y in pairs)
    with pytest.raises(AssertionError, match=r"worst direction by 1\.0[12]"):
        testing.check_non_expansive(step, (500,), tolerance=1e-3)


@pytest.mark.parametrize("kind", ["isotropic", "huber", "weickert"])
def test_smoothing_obeys_the_maximum_principle(kind):
    gamma2 = stencils.max_stable_step(eps=0.1, kind=kind)
    testing.check_maximum_principle(partial(stencils.tv_step, gamma2=gamma2, eps=0.1, kind=kind), SHAPE)


def test_a_diffusion_of_point_three_breaks_the_maximum_principle_and_random_fields_do_not_show_it():
    step = jax.jit(partial(diffusion, gamma2=0.3))
    for seed in range(20):
        x = jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE), jnp.float32)
        assert jnp.abs(step(x)).max() <= jnp.abs(x).max()
    with pytest.raises(AssertionError, match="maximum principle is violated on a spike"):
        testing.check_maximum_principle(step, SHAPE)
    testing.check_maximum_principle(partial(diffusion, gamma2=0.25), SHAPE)


def test_a_gradient_step_is_told_from_one_of_another_energy_or_size():
    energy = partial(stencils.total_variation, eps=0.1)
    step = partial(stencils.tv_step, gamma2=0.025, eps=0.1)
    testing.check_gradient_step(step, energy, 0.025, SHAPE)
    with pytest.raises(AssertionError, match="not a gradient step"):
        testing.check_gradient_step(step, energy, 0.02, SHAPE)
    with pytest.raises(AssertionError, match="the energy rises"):
        testing.check_gradient_step(lambda x: x - 2.5 * x, lambda x: x**2 / 2, 2.5, SHAPE)


def test_a_mean_is_conserved_by_neumann_borders_and_not_by_dirichlet_ones():
    def means(x):
        return x.mean((-3, -2))

    testing.check_conserves(partial(stencils.tv_step, gamma2=0.02, eps=0.1), means, SHAPE)
    with pytest.raises(AssertionError, match="not conserved"):
        testing.check_conserves(partial(stencils.tv_step, gamma2=0.02, eps=0.1, boundary="dirichlet"), means, SHAPE)


def test_our_quantizers_are_straight_through_and_a_rounding_without_a_rule_is_not():
    testing.check_straight_through(partial(quantizers.quantize_activation, clip=1.5, bits=3), low=0.0, high=1.5)
    testing.check_straight_through(partial(quantizers.quantize_weight, clip=1.5, bits=4), low=-1.5, high=1.5)
    with pytest.raises(AssertionError, match=r"the derivative at .* is 0, that of the clamp"):
        testing.check_straight_through(lambda x: jnp.round(jnp.clip(x, 0, 1) * 3) / 3, low=0.0, high=1.0)
    with pytest.raises(AssertionError, match="moves its own level"):
        testing.check_straight_through(lambda x: jnp.clip(x, 0, 1) ** 2, low=0.0, high=1.0)
    with pytest.raises(AssertionError, match="lies outside"):
        testing.check_straight_through(lambda x: x, low=0.0, high=1.0)


def test_a_function_that_answers_nan_passes_no_check():
    broken = lambda x: x * jnp.nan  # noqa: E731
    for check in (
        partial(testing.check_non_expansive, broken),
        partial(testing.check_maximum_principle, broken),
        partial(testing.check_conserves, broken, lambda x: x.sum()),
        partial(testing.check_gradient_step, broken, lambda x: x**2, 0.1),
        partial(testing.check_adjoint, broken, broken),
    ):
        with pytest.raises(AssertionError):
            check(SHAPE)


@given(x=testing.images(), kernel=testing.kernels(), graph=testing.graphs(), bits=testing.bits(largest=8))
def test_strategies_draw_from_few_shapes(x, kernel, graph, bits):
    assert x.shape in testing.IMAGE_SHAPES
    assert kernel.shape in testing.KERNEL_SHAPES
    assert isinstance(graph, jraph.GraphsTuple)
    assert (len(graph.nodes), len(graph.senders)) in testing.GRAPH_SIZES
    assert 2 <= bits <= 8
    for array in (x, kernel, graph.nodes):
        assert array.dtype == jnp.float32
        assert jnp.isfinite(array).all()


@given(graph=testing.graphs())
def test_drawn_graphs_list_their_edges_as_from_edges_does(graph):
    made = graphs.from_edges(graph.receivers, graph.senders, num_nodes=len(graph.nodes), nodes=graph.nodes)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), made, graph))


@given(graph=testing.graphs())
def test_drawn_graphs_have_a_gradient_and_its_adjoint(graph):
    p = graphs.gradient(graph, graph.nodes)
    back = -graphs.divergence(graph, p)
    np.testing.assert_allclose(jnp.vdot(p, p), jnp.vdot(graph.nodes, back), rtol=1e-4)


def test_strategies_name_the_extra_where_hypothesis_is_missing_and_checks_do_without(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("hypothesis"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"extra \[test\]"):
        testing.images()
    testing.check_conserves(lambda x: x, lambda x: x.sum(), (3,))
