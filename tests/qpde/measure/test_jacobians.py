"""Jacobian spectra against dense linear algebra in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpde.measure.jacobians import jacobian_spectrum
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
def spectrum_dense(x, kernel, h):
    return jacobian_spectrum(lambda x: symmetric_step(x, kernel, h), x)


@jax.jit
def spectrum_of_linear_step(x, kernel, h):
    return jacobian_spectrum(lambda x: x - h * conv_adjoint(conv(x, kernel), kernel), x)


@jax.jit
def spectrum_lanczos(x, kernel, h, key):
    return jacobian_spectrum(lambda x: symmetric_step(x, kernel, h), x, method="lanczos", num=SIZE, key=key)


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


def test_bad_arguments_of_a_spectrum_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'dense' or 'lanczos'"):
        jacobian_spectrum(lambda x: x, jnp.ones(2), method="qr")
    with pytest.raises(ValueError, match="needs `key`"):
        jacobian_spectrum(lambda x: x, jnp.ones(2), method="lanczos")
    with pytest.raises(ValueError, match=r"`num` \(=0\)"):
        jacobian_spectrum(lambda x: x, jnp.ones(2), method="lanczos", num=0, key=key)
    with pytest.raises(ValueError, match="use method='lanczos'"):
        jacobian_spectrum(lambda x: x, jnp.ones(5000))


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_the_spectrum_of_nothing_is_empty(method):
    found = jacobian_spectrum(lambda x: 2 * x, jnp.zeros((0, 3)), method=method, key=jax.random.key(0))
    assert found.eigenvalues.shape == found.singular_values.shape == (0,)
