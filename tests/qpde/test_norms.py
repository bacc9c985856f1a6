"""Norms, Lipschitz constants and Jacobian spectra against dense linear algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from qpde.certify.step_bounds import step_lipschitz
from qpde.measure.jacobians import jacobian_spectrum
from qpde.norms import power_iteration_step, spectral_norm
from qpde.operators import conv, conv_adjoint

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


def symmetric_step(x, kernel, h):
    """x - h K^T relu(K x), K a convolution with zero borders: contains custom_vjp, so no forward mode."""
    return x - h * conv_adjoint(jax.nn.relu(conv(x, kernel)), kernel)


@jax.jit
def norm_of_matrix(matrix, key):
    return spectral_norm(lambda x: matrix @ x, (matrix.shape[1],), key=key)


@jax.jit
def norm_of_matrix_with_adjoint(matrix, key):
    return spectral_norm(lambda x: matrix @ x, (matrix.shape[1],), adjoint=lambda y: matrix.T @ y, key=key)


@jax.jit
def norm_of_conv(kernel, key):
    return spectral_norm(lambda x: conv(x, kernel), IMAGE, key=key, iterations=60)


@jax.jit
def spectrum_dense(x, kernel, h):
    return jacobian_spectrum(lambda x: symmetric_step(x, kernel, h), x)


@jax.jit
def spectrum_of_linear_step(x, kernel, h):
    return jacobian_spectrum(lambda x: x - h * conv_adjoint(conv(x, kernel), kernel), x)


@jax.jit
def spectrum_lanczos(x, kernel, h, key):
    return jacobian_spectrum(lambda x: symmetric_step(x, kernel, h), x, method="lanczos", num=SIZE, key=key)


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


@given(seed=SEEDS, product=st.floats(0.1, 6.0), symmetric=st.booleans())
def test_no_two_points_move_apart_faster_than_the_lipschitz_constant(seed, product, symmetric):
    k1 = random(seed, (5, 4))
    k2 = k1 if symmetric else random(seed + 1, (5, 4))
    norms = [np.float32(np.linalg.norm(k, 2)) for k in (k1, k2)]
    h = product / float(norms[0] ** 2)
    x, y = random(seed + 2, (4,), 2), random(seed + 3, (4,), 2)

    def f(x):
        return x - h * k2.T @ np.maximum(k1 @ x + 0.3, 0)

    bound = step_lipschitz(norms[0], None if symmetric else norms[1], step_size=h)
    assert np.linalg.norm(f(x) - f(y)) <= float(bound) * np.linalg.norm(x - y) * (1 + 1e-5)


def test_lipschitz_constant_of_the_symmetric_step_is_attained():
    # Where K x > 0 the step multiplies the direction v1 by 1 - h |K|^2 = -2: no smaller constant holds.
    constant = step_lipschitz(np.array([1.0, 2.0], np.float32), step_size=0.75)
    np.testing.assert_allclose(constant, [1.0, 2.0])

    def f(x):
        return x - 0.75 * 2.0 * np.maximum(2.0 * x, 0)

    assert np.isclose(abs(f(2.0) - f(1.0)), 2.0)
    np.testing.assert_allclose(step_lipschitz(2.0, 3.0, step_size=0.5), 4.0)
    np.testing.assert_allclose(step_lipschitz(1.0, step_size=np.array([0.5, 4.0], np.float32)), [1.0, 3.0])
    np.testing.assert_allclose(step_lipschitz(np.array([1.0, 2.0], np.float32), 3.0, step_size=1), [4.0, 7.0])


@given(seed=SEEDS, h=st.floats(0.01, 1.0))
def test_dense_spectrum_equals_numpy(seed, h):
    x, kernel = random(seed, IMAGE), random(seed + 1, (3, 3, 3, 4), 0.3)
    k = np.asarray(dense_conv(kernel), np.float64)
    active = np.diag((k @ x.ravel() > 0).astype(float))
    jacobian = np.eye(SIZE) - h * k.T @ active @ k
    spectrum = spectrum_dense(x, kernel, h)
    tolerance = 1e-5 * np.linalg.norm(jacobian, 2)
    np.testing.assert_allclose(spectrum.eigenvalues, np.linalg.eigvalsh(jacobian), atol=tolerance)
    np.testing.assert_allclose(spectrum.singular_values, np.linalg.svd(jacobian, compute_uv=False), atol=tolerance)


@given(seed=SEEDS)
def test_symmetric_step_has_its_spectrum_in_minus_one_to_one(seed):
    x, kernel = random(seed, IMAGE), random(seed + 1, (3, 3, 3, 4))
    h = 2 / np.linalg.norm(dense_conv(kernel), 2) ** 2
    spectrum = spectrum_dense(x, kernel, h)
    assert np.all(np.abs(spectrum.eigenvalues) <= 1 + 1e-5)
    assert spectrum.singular_values[0] <= 1 + 1e-5
    # And the limit is sharp: on the half space where everything is active, 4 / |K|^2 gives the eigenvalue -3.
    linear = spectrum_of_linear_step(x, kernel, 2 * h)
    assert np.isclose(linear.eigenvalues[0], -3, atol=1e-4)


@given(seed=SEEDS, h=st.floats(0.01, 1.0))
def test_full_lanczos_equals_dense(seed, h):
    x, kernel = random(seed, IMAGE), random(seed + 1, (3, 3, 3, 4), 0.3)
    dense, lanczos = spectrum_dense(x, kernel, h), spectrum_lanczos(x, kernel, h, jax.random.key(seed))
    gain = float(dense.singular_values[0])
    np.testing.assert_allclose(lanczos.eigenvalues, dense.eigenvalues, atol=1e-5 * gain)
    # Roots of eigenvalues of J^T J: an error of 1e-6 gain^2 there is up to 1e-3 gain at the small end.
    np.testing.assert_allclose(lanczos.singular_values, dense.singular_values, atol=2e-3 * gain)
    assert np.isclose(lanczos.singular_values[0], gain, rtol=1e-5)


def test_short_lanczos_stays_inside_and_finds_the_ends():
    matrix = random(6, (200, 200)) / 200**0.5
    exact = jacobian_spectrum(lambda x: matrix @ x, jnp.zeros(200))
    short = jacobian_spectrum(lambda x: matrix @ x, jnp.zeros(200), method="lanczos", num=40, key=jax.random.key(0))
    assert short.eigenvalues.shape == short.singular_values.shape == (40,)
    for found, truth in zip(short, exact, strict=True):
        assert np.min(truth) - 1e-5 <= np.min(found)
        assert np.max(found) <= np.max(truth) + 1e-5
        assert np.isclose(np.max(found), np.max(truth), rtol=1e-2)
    assert np.isclose(short.eigenvalues[0], exact.eigenvalues[0], rtol=1e-2)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_lanczos_goes_on_where_the_krylov_space_closes(scale):
    spectrum = jacobian_spectrum(
        lambda x: scale * x, jnp.ones((2, 3)), method="lanczos", num=100, key=jax.random.key(0)
    )
    np.testing.assert_allclose(spectrum.eigenvalues, np.full(6, scale), atol=1e-6)
    np.testing.assert_allclose(spectrum.singular_values, np.full(6, abs(scale)), atol=1e-6)


def test_map_that_changes_the_shape_has_singular_values_only():
    matrix = random(7, (3, 5))
    truth = np.linalg.svd(matrix, compute_uv=False)
    spectrum = jacobian_spectrum(lambda x: matrix @ x, jnp.zeros(5))
    assert spectrum.eigenvalues is None
    np.testing.assert_allclose(spectrum.singular_values, truth, rtol=1e-5)
    spectrum = jacobian_spectrum(lambda x: matrix @ x, jnp.zeros(5), method="lanczos", key=jax.random.key(0))
    np.testing.assert_allclose(spectrum.singular_values[:3], truth, rtol=1e-5)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_spectrum_is_in_the_dtype_of_the_point_or_wider(method, dtype):
    matrix = np.random.default_rng(11).standard_normal((6, 6))
    with jax.enable_x64(dtype == jnp.float64):
        narrow = jnp.asarray(matrix, dtype)
        found = jacobian_spectrum(lambda x: narrow @ x, jnp.ones(6, dtype), method=method, key=jax.random.key(0))
    truth = np.linalg.eigvalsh((matrix + matrix.T) / 2), np.linalg.svd(matrix, compute_uv=False)
    for values, true in zip(found, truth, strict=True):
        assert values.dtype == (np.float64 if dtype == jnp.float64 else np.float32)
        np.testing.assert_allclose(values, true, atol=1e-9 if dtype == jnp.float64 else 4 * jnp.finfo(dtype).eps)


def test_spectrum_is_the_same_eager_jitted_and_vmapped():
    points, kernel = random(8, (2, *IMAGE)), jnp.asarray(random(9, (3, 3, 3, 4), 0.3))
    eager = jacobian_spectrum(lambda x: symmetric_step(x, kernel, 0.5), jnp.asarray(points[0]))
    jitted = spectrum_dense(points[0], kernel, 0.5)
    dense = jax.vmap(lambda x: spectrum_dense(x, kernel, 0.5))(points)
    lanczos = jax.vmap(lambda x: spectrum_lanczos(x, kernel, 0.5, jax.random.key(0)))(points)
    np.testing.assert_allclose(eager.eigenvalues, jitted.eigenvalues, atol=1e-5)
    np.testing.assert_allclose(eager.eigenvalues, dense.eigenvalues[0], atol=1e-5)
    np.testing.assert_allclose(lanczos.eigenvalues, dense.eigenvalues, atol=1e-4)


def test_bad_arguments_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`iterations` \(=0\)"):
        spectral_norm(lambda x: x, (2,), iterations=0, key=key)
    with pytest.raises(ValueError, match="'dense' or 'lanczos'"):
        jacobian_spectrum(lambda x: x, jnp.ones(2), method="qr")
    with pytest.raises(ValueError, match="needs `key`"):
        jacobian_spectrum(lambda x: x, jnp.ones(2), method="lanczos")
    with pytest.raises(ValueError, match=r"`num` \(=0\)"):
        jacobian_spectrum(lambda x: x, jnp.ones(2), method="lanczos", num=0, key=key)
    with pytest.raises(ValueError, match="use method='lanczos'"):
        jacobian_spectrum(lambda x: x, jnp.ones(5000))
