"""Lipschitz constants of steps: no two points move apart faster, and some as fast."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qpde.certify.step_bounds import step_lipschitz

SEEDS = st.integers(0, 2**31 - 1)


def random(seed, shape, scale=1.0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


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
