"""Norms of linear maps against dense linear algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from qpde.norms import power_iteration_step, spectral_norm
from qpde.operators import conv

SEEDS = st.integers(0, 2**31 - 1)


IMAGE = (1, 4, 4, 3)


SIZE = 48


def random(seed, shape, scale=1.0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


@jax.jit
def dense_conv(kernel):
    """The matrix of a convolution on images of shape IMAGE, one column per unit vector."""
    units = jnp.eye(SIZE).reshape(SIZE, *IMAGE[1:])
    return conv(units, kernel).reshape(SIZE, -1).T


@jax.jit
def norm_of_matrix(matrix, key):
    return spectral_norm(lambda x: matrix @ x, (matrix.shape[1],), key=key)


@jax.jit
def norm_of_matrix_with_adjoint(matrix, key):
    return spectral_norm(lambda x: matrix @ x, (matrix.shape[1],), adjoint=lambda y: matrix.T @ y, key=key)


@jax.jit
def norm_of_conv(kernel, key):
    return spectral_norm(lambda x: conv(x, kernel), IMAGE, key=key, iterations=60)


@given(
    seed=SEEDS,
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    shape=st.sampled_from([(5, 5), (7, 3), (3, 7), (1, 1)]),
)
def test_estimate_of_the_norm_is_never_above_it(seed, scale, shape):
    matrix = random(seed, shape, scale)
    truth = np.linalg.norm(matrix.astype(np.float64), 2)
    estimate = float(norm_of_matrix(matrix, jax.random.key(seed)))
    assert estimate <= truth * (1 + 1e-6), "rounding alone may lift it, by a few float32 units"
    # Two close singular values leave v undecided but sigma good: log(n) / iterations at worst, far less here.
    assert estimate >= 0.95 * truth
    assert np.isclose(estimate, float(norm_of_matrix_with_adjoint(matrix, jax.random.key(seed))), rtol=1e-6)


@given(seed=SEEDS)
def test_norm_of_a_convolution_with_borders_equals_the_dense_svd(seed):
    kernel = random(seed, (3, 3, 3, 5))
    truth = np.linalg.norm(dense_conv(kernel), 2)
    estimate = norm_of_conv(kernel, jax.random.key(seed))
    # Close singular values cost log(n) / (2 iterations) = 3 % at worst, and mostly nothing.
    assert 0.97 * truth <= estimate <= truth * (1 + 1e-6)


@given(seed=SEEDS, iterations=st.integers(1, 6))
def test_more_iterations_never_lower_the_estimate(seed, iterations):
    matrix, v = random(seed, (6, 6)), random(seed + 1, (6,))
    v, previous = v / np.linalg.norm(v), 0.0
    for _ in range(iterations):
        first = np.linalg.norm(matrix @ v)
        sigma, v = step_of_matrix(matrix, v)
        assert max(first, previous) <= float(sigma) * (1 + 1e-6)
        assert float(sigma) <= np.linalg.norm(matrix @ v) * (1 + 1e-6)
        assert np.isclose(np.linalg.norm(v), 1, rtol=1e-6)
        previous = float(sigma)


@jax.jit
def step_of_matrix(matrix, v):
    return power_iteration_step(lambda x: matrix @ x, lambda y: matrix.T @ y, v)


def test_one_warm_started_iteration_a_step_follows_a_moving_map():
    matrix, change = random(0, (12, 12)), random(1, (12, 12), 0.01)
    v = np.full(12, 12**-0.5, np.float32)
    for i in range(100):
        moved = matrix + i * change
        sigma, v = step_of_matrix(moved, v)
    assert np.isclose(sigma, np.linalg.norm(moved, 2), rtol=1e-2)


def test_gradient_of_the_norm_is_the_outer_product_of_the_singular_vectors():
    # Singular values 4, 2, 1, 0.5: after 20 iterations v is exact in float32.
    u, _, vt = np.linalg.svd(random(3, (4, 6)), full_matrices=False)
    matrix = (u * np.array([4.0, 2.0, 1.0, 0.5], np.float32)) @ vt
    gradient = jax.grad(lambda a: spectral_norm(lambda x: a @ x, (6,), key=jax.random.key(0)))(matrix)
    np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-5)


def test_gradient_through_a_convolution_equals_the_finite_difference():
    kernel = random(4, (3, 3, 3, 2), 0.3)
    # Enough iterations that the norm itself, not an estimate on its way up, is differenced.
    norm = jax.jit(lambda k: spectral_norm(lambda x: conv(x, k), IMAGE, key=jax.random.key(0), iterations=200))
    check_grads(norm, (kernel,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_zero_map_has_norm_and_gradient_zero():
    value, gradient = jax.value_and_grad(norm_of_matrix)(jnp.zeros((2, 3)), jax.random.key(0))
    assert value == 0
    assert not np.any(gradient)
    sigma, v = step_of_matrix(np.zeros((3, 3), np.float32), np.array([1, 0, 0], np.float32))
    assert sigma == 0
    np.testing.assert_array_equal(v, [1, 0, 0])


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_norms_whose_squares_are_just_floats_are_found(scale):
    matrix = random(10, (4, 3))
    found, gradient = jax.value_and_grad(norm_of_matrix)(matrix * np.float32(scale), jax.random.key(0))
    usual = jax.grad(norm_of_matrix)(matrix, jax.random.key(0))
    np.testing.assert_allclose(found, scale * np.linalg.norm(matrix, 2), rtol=1e-4)
    np.testing.assert_allclose(gradient, usual, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("given_adjoint", [False, True])
def test_norm_of_a_double_precision_map_is_found_in_single(given_adjoint):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        matrix = np.random.default_rng(0).standard_normal((4, 3))
        adjoint = (lambda y: matrix.T @ y) if given_adjoint else None
        norm = spectral_norm(lambda x: matrix @ x, (3,), adjoint=adjoint, key=jax.random.key(0), iterations=60)
    assert norm.dtype == np.float32
    np.testing.assert_allclose(norm, np.linalg.norm(matrix, 2), rtol=1e-5)


def test_norm_is_the_same_eager_jitted_and_vmapped():
    matrices = random(5, (3, 5, 4))
    keys = jax.random.split(jax.random.key(1), 3)
    eager = [spectral_norm(lambda x, a=a: a @ x, (4,), key=k) for a, k in zip(matrices, keys, strict=True)]
    np.testing.assert_allclose(eager, [norm_of_matrix(a, k) for a, k in zip(matrices, keys, strict=True)], rtol=1e-6)
    np.testing.assert_allclose(eager, jax.vmap(norm_of_matrix)(matrices, keys), rtol=1e-6)


def test_nan_in_the_map_stays_nan():
    matrix = np.full((3, 3), np.nan, np.float32)
    assert np.isnan(norm_of_matrix(matrix, jax.random.key(0)))


def test_a_norm_needs_an_iteration():
    with pytest.raises(ValueError, match=r"`iterations` \(=0\)"):
        spectral_norm(lambda x: x, (2,), iterations=0, key=jax.random.key(0))
