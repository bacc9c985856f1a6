"""Numbers as people pass them: arrays of one element, floats for counts, values that JAX already knows."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from qpde import graphs, norms, operators, stencils

X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
GRAPH = graphs.from_edges([0, 1], [1, 2], num_nodes=3)
FIELD = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)
STEPS = {
    "tv_step": lambda **o: stencils.tv_step(X, **o),
    "smooth": lambda **o: stencils.smooth(X, steps=2, **o),
    "implicit_step": lambda **o: stencils.implicit_step(X, **o),
    "graph step": lambda **o: graphs.tv_step(GRAPH, FIELD, **o),
}
ENERGIES = {
    "total_variation": lambda **o: stencils.total_variation(X, **o),
    "graph energy": lambda **o: graphs.total_variation(GRAPH, FIELD, **o),
}


@pytest.fixture(autouse=True)
def without_annotations():
    """As users call: nothing but the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", STEPS)
def test_an_array_of_no_axes_is_its_number(name):
    expected = STEPS[name](gamma2=0.01, eps=0.25)
    np.testing.assert_allclose(STEPS[name](gamma2=np.array(0.01), eps=np.array(0.25)), expected, rtol=1e-6)
    np.testing.assert_allclose(STEPS[name](gamma2=np.float32(0.01), eps=np.float64(0.25)), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="gamma2"):
        STEPS[name](gamma2=np.array(-0.01), eps=0.25)


@pytest.mark.parametrize("kind", [np.array, jnp.array])
@pytest.mark.parametrize("name", STEPS)
def test_an_array_of_one_element_is_refused_by_name(name, kind):
    with pytest.raises(ValueError, match=r"`eps` has shape \(1,\); it must be one number"):
        STEPS[name](gamma2=0.01, eps=kind([0.25]))
    with pytest.raises(ValueError, match=r"`gamma2` has shape \(1,\); it must be one number"):
        STEPS[name](gamma2=kind([0.01]), eps=0.25)


@pytest.mark.parametrize("name", [*STEPS, *ENERGIES])
@pytest.mark.parametrize("eps", [0.0, -1.0, np.inf, np.nan])
def test_an_eps_that_is_known_must_be_positive_and_finite(name, eps):
    run = ENERGIES.get(name) or (lambda **o: STEPS[name](gamma2=jnp.float32(0.01), **o))
    for value in (eps, np.float32(eps), np.array(eps, np.float32), jnp.float32(eps)):
        with pytest.raises(ValueError, match=r"eps.*must be positive and finite"):
            run(eps=value)
    jax.eval_shape(lambda eps: run(eps=eps), jnp.float32(eps))  # a traced one cannot be checked


@pytest.mark.parametrize("bad", [2.0, -1, "two", None])
def test_numbers_of_steps_are_whole(bad):
    with pytest.raises(ValueError, match=r"`steps` .* must be a whole number, 0 or more"):
        stencils.smooth(X, steps=bad, gamma2=0.01, eps=0.25)
    assert stencils.smooth(X, steps=np.int64(2), gamma2=0.01, eps=0.25).shape == X.shape
    with pytest.raises(ValueError, match=r"`iterations` .* must be a whole number, 1 or more"):
        norms.spectral_norm(lambda v: v, (3,), iterations=bad, key=jax.random.key(0))


@pytest.mark.parametrize("option", ["stride", "padding", "dilation"])
def test_the_steps_of_a_kernel_are_whole(option):
    kernels = {"conv": jnp.ones((3, 3, 2, 4)), "depthwise": jnp.ones((3, 3, 1, 2))}
    for name, kernel in kernels.items():
        with pytest.raises(ValueError, match=rf"`{option}` \(=1.0\) must be a whole number"):
            getattr(operators, name)(X, kernel, **{option: 1.0})


def test_features_of_nodes_may_be_a_list_and_no_dictionary():
    build = graphs.from_edges
    found = build([0], [1], num_nodes=2, nodes=[[1.0, 2.0], [3.0, 4.0]]).nodes
    np.testing.assert_array_equal(found, np.float32([[1, 2], [3, 4]]))
    for nodes, message in (
        ({"a": np.zeros((2, 1))}, "features are of type dict: give an array"),
        (3.0, "of type float"),
    ):
        with pytest.raises(ValueError, match=message):
            build([0], [1], num_nodes=2, nodes=nodes)
