"""Stencils: adjointness to the last bit, and for every kind of smoothing exactly the properties its row claims.

Statements of mathematics are checked in float64, where a violation cannot hide behind rounding; what is shipped is
float32, and the last part checks that it does the same.
"""

import doctest
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from qpde import stencils
from qpde.stencils import (
    ENERGIES,
    divergence,
    gradient,
    implicit_step,
    max_stable_step,
    smooth,
    total_variation,
    tv_step,
)
from qpde.testing import check_gradient_step, check_non_expansive

BOUNDARIES = ["neumann", "periodic", "dirichlet"]
CONVEX = [kind for kind, row in ENERGIES.items() if row.convex]
UNCOUPLED = [kind for kind, row in ENERGIES.items() if not row.coupled]
SHAPES = [(2, 5, 7, 3), (1, 6, 2), (6, 1, 1), (2, 1, 2, 2, 1)]  # one row, one column, two batch axes
ROUNDING = 1e-12  # of float64, for sums of a few hundred numbers

# Borders are the differences' business and kinds the flux's: every kind, and every border for a coupled and an
# uncoupled one, cover all combinations at half the compilations.
PAIRS = [(kind, "neumann") for kind in ENERGIES] + [
    (kind, boundary) for kind in ("isotropic", "huber") for boundary in ("periodic", "dirichlet")
]
# The implicit step uses the diffusivities only, and of them only that they are positive.
IMPLICIT_PAIRS = [pair for pair in PAIRS if pair[0] in ("isotropic", "huber", "weickert")]
STEPS = [(tv_step, kind) for kind in ENERGIES] + [(implicit_step, "isotropic")]
every_kind = pytest.mark.parametrize("kind", ENERGIES)
every_boundary = pytest.mark.parametrize("boundary", BOUNDARIES)
every_pair = pytest.mark.parametrize(("kind", "boundary"), PAIRS)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@cache
def compiled_step(kind, boundary):
    """x, gamma2, eps -> the step and the energies before and after; gamma2 and eps traced, so compiled once a shape."""

    @jax.jit
    def step(x, gamma2, eps):
        y = tv_step(x, gamma2=gamma2, eps=eps, kind=kind, boundary=boundary)
        energy = partial(total_variation, eps=eps, kind=kind, boundary=boundary)
        return y, energy(x), energy(y)

    return step


@cache
def compiled_implicit_step(kind, boundary):
    return jax.jit(lambda x, gamma2, eps: implicit_step(x, gamma2=gamma2, eps=eps, kind=kind, boundary=boundary))


def random_image(seed, shape, scale=1.0):
    """Noise on 0, on a checkerboard (the worst case of every bound) or on steps: differences below and above eps."""
    rng = np.random.default_rng(seed)
    checkerboard = np.indices(shape[-3:-1]).sum(axis=0)[..., None] % 2 * 2 - 1
    background = [0, checkerboard, rng.integers(-2, 3, shape)][seed % 3]
    return scale * (background + 10.0 ** rng.uniform(-3, 0) * rng.standard_normal(shape))


def cases(check):
    """Images from far below to far above eps, steps at the bound and below; always faint checkerboards at the bound."""
    ranges = {"log_ratio": st.floats(-2, 3), "log_eps": st.floats(-3, 1), "part": st.just(1.0) | st.floats(0.01, 1)}
    check = given(seed=seeds, **ranges)(check)
    for seed in (1, 4, 7):
        check = example(seed=seed, log_ratio=-2.0, log_eps=0.0, part=1.0)(check)
    return settings(max_examples=60)(check)


def compiled_case(seed, log_ratio, log_eps, part, kind, count=1, shape=(2, 5, 7, 3)):
    """`count` random images, eps, and a gamma2 that is `part` of the bound."""
    eps = 10.0**log_eps
    images = [jnp.asarray(random_image(seed + i, shape, eps * 10.0**log_ratio)) for i in range(count)]
    return *images, jnp.asarray(part * max_stable_step(eps=eps, kind=kind)), jnp.asarray(eps)


# --- Differences ------------------------------------------------------------------------------------------------------


@every_boundary
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_difference_to_the_next_pixel(shape, boundary):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    behind = {"neumann": "edge", "periodic": "wrap", "dirichlet": "constant"}[boundary]
    expected = [
        np.diff(np.pad(x, [(0, int(a == axis % x.ndim)) for a in range(x.ndim)], mode=behind), axis=axis)
        for axis in (-3, -2)
    ]
    np.testing.assert_array_equal(gradient(x, boundary=boundary), np.stack(expected, axis=-1))


@every_boundary
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_is_minus_the_exact_adjoint_of_gradient(shape, boundary):
    compiled = jax.jit(lambda x, p: (gradient(x, boundary=boundary), divergence(p, boundary=boundary)))

    @given(seed=seeds)
    def check(seed):
        # Small integers: every product and sum is exact in float32, so both sides must be equal, not just close.
        rng = np.random.default_rng(seed)
        x = rng.integers(-50, 51, shape).astype(np.float32)
        p = rng.integers(-50, 51, (*shape, 2)).astype(np.float32)
        gradient_x, divergence_p = compiled(x, p)
        assert jnp.sum(gradient_x * p) == -jnp.sum(x * divergence_p)

    check()


def orders_of_convergence(errors):
    return np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))


def wave(size):
    """u(a, b) = sin a cos b + sin b / 2 on a periodic grid, with its grid spacing."""
    step = 2 * np.pi / size
    grid = np.arange(size) * step
    a, b = np.meshgrid(grid, grid, indexing="ij")
    return a, b, step, np.sin(a) * np.cos(b) + np.sin(b) / 2


def test_divergence_of_gradient_is_a_second_order_laplacian(double):
    errors = []
    for size in (16, 32, 64):
        a, b, step, u = wave(size)
        laplacian = -2 * np.sin(a) * np.cos(b) - np.sin(b) / 2
        ours = divergence(gradient(u[..., None], boundary="periodic"), boundary="periodic")[..., 0] / step**2
        errors.append(np.abs(ours - laplacian).max())
    np.testing.assert_allclose(orders_of_convergence(errors), 2, atol=0.05)


@pytest.mark.parametrize(("kind", "order"), [("anisotropic", 2), ("isotropic", 1)])
def test_explicit_step_is_consistent_with_the_differential_equation(double, kind, order):
    """(S(u) - u)/gamma2 -> div F(grad u): differences are scaled to the grid by eps -> eps * step."""
    errors = []
    for size in (64, 128, 256):
        a, b, step, u = wave(size)
        u_a, u_b = np.cos(a) * np.cos(b), -np.sin(a) * np.sin(b) + np.cos(b) / 2
        u_aa, u_bb, u_ab = -np.sin(a) * np.cos(b), -np.sin(a) * np.cos(b) - np.sin(b) / 2, -np.cos(a) * np.sin(b)
        if kind == "anisotropic":
            expected = u_aa / (u_a**2 + 1) ** 1.5 + u_bb / (u_b**2 + 1) ** 1.5
        else:
            curvature = u_aa * (1 + u_b**2) - 2 * u_a * u_b * u_ab + u_bb * (1 + u_a**2)
            expected = curvature / (1 + u_a**2 + u_b**2) ** 1.5
        gamma2 = max_stable_step(eps=step)
        smoothed = tv_step(u[..., None], gamma2=gamma2, eps=step, kind=kind, boundary="periodic")[..., 0]
        errors.append(np.abs((smoothed - u) / gamma2 / step - expected).max())
    np.testing.assert_allclose(orders_of_convergence(errors), order, atol=0.15)


# --- The rows of the table --------------------------------------------------------------------------------------------


@every_kind
def test_row_states_the_facts_that_its_bound_rests_on(double, kind):
    """Psi' = s g;  0 <= g <= L and F' <= L;  F' >= 0 exactly where the row says convex."""
    row, eps = ENERGIES[kind], jnp.asarray(0.3)
    largest_slope = 1 / (4 * max_stable_step(eps=0.3, kind=kind))
    s = jnp.linspace(1e-3, 10, 4001)
    flux = (lambda s: row.flux(s, eps)) if row.flux else (lambda s: s * row.diffusivity(s * s, eps))
    g, slope = row.diffusivity(s * s, eps), jax.vmap(jax.grad(flux))(s)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda s: row.density(s * s, eps)))(s), flux(s), atol=1e-6)
    np.testing.assert_allclose(s * g, flux(s), rtol=1e-12)
    assert jnp.all((g >= 0) & (g <= largest_slope * (1 + ROUNDING)))
    assert jnp.all(slope <= largest_slope * (1 + ROUNDING))
    assert bool(jnp.all(slope >= 0)) is row.convex


@every_pair
def test_step_goes_down_the_gradient_of_its_energy(kind, boundary):
    options = {"eps": 0.3, "kind": kind, "boundary": boundary}
    gamma2 = max_stable_step(eps=0.3, kind=kind)
    step, energy = partial(tv_step, gamma2=gamma2, **options), partial(total_variation, **options)
    check_gradient_step(step, energy, gamma2, (2, 5, 7, 3), scale=0.3)


def test_energy_is_the_sum_of_smoothed_lengths_per_channel():
    x = jnp.stack([jnp.array([[[0.0, 3.0], [4.0, 9.0]]]), jnp.zeros((1, 2, 2))], axis=-1)
    lengths = [np.sqrt(9 + 16 + 1), np.sqrt(36 + 1), np.sqrt(25 + 1), 1]  # differences (4,3) (6,0) (0,5) (0,0), eps 1
    np.testing.assert_allclose(total_variation(x, eps=1.0), [[sum(lengths), 4.0]], rtol=1e-6)


# --- What a step keeps ------------------------------------------------------------------------------------------------


@every_pair
def test_step_obeys_the_maximum_principle_and_never_raises_the_energy(double, kind, boundary):
    @cases
    def check(**case):
        x, gamma2, eps = compiled_case(**case, kind=kind)
        y, before, after = compiled_step(kind, boundary)(x, gamma2, eps)
        assert jnp.all(after <= before * (1 + ROUNDING))
        low, high = x.min(axis=(1, 2)), x.max(axis=(1, 2))
        if boundary == "dirichlet":  # the 0 behind the border is a neighbour too
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        slack = ROUNDING * jnp.abs(x).max()
        assert jnp.all((y.min(axis=(1, 2)) >= low - slack) & (y.max(axis=(1, 2)) <= high + slack))

    check()


@pytest.mark.parametrize(("kind", "boundary"), [pair for pair in PAIRS if pair[1] != "dirichlet"])
def test_step_keeps_the_mean_and_fixes_constants(double, kind, boundary):
    @cases
    def check(**case):
        x, gamma2, eps = compiled_case(**case, kind=kind)
        step = compiled_step(kind, boundary)
        y = step(x, gamma2, eps)[0]
        np.testing.assert_allclose(
            y.mean(axis=(1, 2)), x.mean(axis=(1, 2)), rtol=0, atol=ROUNDING * float(jnp.abs(x).max())
        )
        constant = jnp.broadcast_to(x[:, :1, :1], x.shape)
        np.testing.assert_array_equal(step(constant, gamma2, eps)[0], constant)

    check()


@pytest.mark.parametrize(("kind", "boundary"), [pair for pair in PAIRS if pair[0] in CONVEX])
def test_step_of_a_convex_energy_is_non_expansive(double, kind, boundary):
    @cases
    def check(**case):
        x, other, gamma2, eps = compiled_case(**case, kind=kind, count=2)
        step = compiled_step(kind, boundary)
        for distance in (1.0, 1e-3):  # far and near pairs: near ones see the local slope of the flux
            y = x + distance * (other - x)
            after = jnp.linalg.norm(step(x, gamma2, eps)[0] - step(y, gamma2, eps)[0])
            assert after <= jnp.linalg.norm(x - y) * (1 + ROUNDING) + ROUNDING * jnp.abs(x).max()

    check()


@pytest.mark.parametrize("kind", ENERGIES)
def test_the_worst_direction_of_a_step_grows_exactly_where_its_kind_is_not_convex(kind):
    step = partial(tv_step, gamma2=max_stable_step(eps=0.5, kind=kind), eps=0.5, kind=kind)
    if ENERGIES[kind].convex:
        check_non_expansive(step, (1, 5, 6, 1))
    else:
        with pytest.raises(AssertionError, match="expansive"):
            check_non_expansive(step, (1, 5, 6, 1))


@pytest.mark.parametrize(("kind", "boundary"), [pair for pair in PAIRS if pair[0] in CONVEX and pair[0] in UNCOUPLED])
def test_uncoupled_convex_step_preserves_order_and_the_maximum_norm(double, kind, boundary):
    @cases
    def check(**case):
        x, other, gamma2, eps = compiled_case(**case, kind=kind, count=2)
        step = compiled_step(kind, boundary)
        above = x + jnp.maximum(other, 0)
        difference = step(above, gamma2, eps)[0] - step(x, gamma2, eps)[0]
        slack = ROUNDING * jnp.abs(above).max()
        assert difference.min() >= -slack
        assert difference.max() <= jnp.maximum(other, 0).max() + slack

    check()


@every_pair
def test_step_commutes_with_exchanging_rows_and_columns(double, kind, boundary):
    x, gamma2, eps = compiled_case(5, 0.0, -1.0, 1.0, kind, shape=(2, 7, 7, 3))
    step = compiled_step(kind, boundary)
    exchanged = step(x.swapaxes(1, 2), gamma2, eps)[0].swapaxes(1, 2)
    np.testing.assert_allclose(exchanged, step(x, gamma2, eps)[0], rtol=0, atol=ROUNDING)


@every_kind
def test_periodic_step_commutes_with_shifts(double, kind):
    x, gamma2, eps = compiled_case(6, 0.0, -1.0, 1.0, kind)
    step = compiled_step(kind, "periodic")
    shifted = jnp.roll(x, (2, 3), axis=(1, 2))
    np.testing.assert_allclose(
        step(shifted, gamma2, eps)[0], jnp.roll(step(x, gamma2, eps)[0], (2, 3), axis=(1, 2)), rtol=0, atol=ROUNDING
    )


@pytest.mark.parametrize(("kind", "boundary"), [pair for pair in PAIRS if pair[1] != "dirichlet"])
@pytest.mark.parametrize("axis", [1, 2])
def test_step_commutes_with_flips_exactly_where_axes_are_not_coupled(double, kind, boundary, axis):
    x, gamma2, eps = compiled_case(7, 0.0, -1.0, 1.0, kind)
    step = compiled_step(kind, boundary)
    flipped = jnp.flip(step(jnp.flip(x, axis), gamma2, eps)[0], axis)
    commutes = bool(jnp.abs(flipped - step(x, gamma2, eps)[0]).max() <= ROUNDING)
    assert commutes is (not ENERGIES[kind].coupled)


@pytest.mark.parametrize(("step", "kind"), STEPS)
def test_images_and_channels_do_not_see_each_other(step, kind):
    x = random_image(8, (2, 5, 7, 3)).astype(np.float32)
    changed = x.copy()
    changed[1, :, :, 2] += random_image(9, (5, 7)).astype(np.float32)
    step = partial(step, gamma2=0.02, eps=0.1, kind=kind)
    difference = np.array(step(changed) != step(x))
    assert difference[1, :, :, 2].any()
    difference[1, :, :, 2] = False
    assert not difference.any()


def test_step_edge_survives_where_linear_diffusion_of_the_same_strength_blurs_it():
    """Equal strength: both are diffusion with gamma2 g(0) = 1/4 on faint noise, and remove it alike."""
    eps, noise = 0.01, 1e-3 * np.random.default_rng(10).standard_normal((32, 32, 1)).astype(np.float32)
    edge = np.broadcast_to(np.arange(32)[None, :, None] >= 16, (32, 32, 1)).astype(np.float32)
    contrast, roughness = {}, {}
    for kind in ("isotropic", "anisotropic", "huber", "linear"):
        y = np.asarray(smooth(edge + noise, steps=30, gamma2=max_stable_step(eps=eps, kind=kind), eps=eps, kind=kind))
        contrast[kind] = float((y[:, 16] - y[:, 15]).mean())
        roughness[kind] = float(np.diff(y[:, :8], axis=0).std() / np.diff(noise[:, :8], axis=0).std())
    assert contrast["linear"] < 0.2
    assert min(contrast[kind] for kind in ("isotropic", "anisotropic", "huber")) > 0.8
    assert max(roughness.values()) < 0.2


@every_kind
def test_bound_is_sharp(double, kind):
    """On a faint checkerboard one step multiplies by 1 - 2 gamma2/bound: -1 at the bound, -4 at 2.5 times it."""
    eps = 0.5
    x = 1e-3 * jnp.asarray(np.indices((4, 4)).sum(axis=0) % 2 * 2.0 - 1)[..., None]
    energy = lambda x: total_variation(x, eps=eps, kind=kind, boundary="periodic").sum()  # noqa: E731
    descent = jax.grad(energy)(x)
    bound = max_stable_step(eps=eps, kind=kind)
    np.testing.assert_allclose(x - bound * descent, -x, rtol=1e-4)
    beyond = x - 2.5 * bound * descent
    assert energy(beyond) > energy(x)
    assert jnp.abs(beyond).max() > 3.9 * jnp.abs(x).max()  # neither maximum principle nor non-expansive around 0


@pytest.mark.parametrize("kind", ["isotropic", "huber", "weickert"])
def test_smooth_is_its_steps_one_after_the_other(kind):
    x = random_image(11, (2, 5, 7, 3)).astype(np.float32)
    step = partial(tv_step, gamma2=0.02, eps=0.1, kind=kind)
    three = smooth(x, steps=3, gamma2=0.02, eps=0.1, kind=kind)
    np.testing.assert_allclose(three, step(step(step(x))), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(smooth(x, steps=0, gamma2=0.02, eps=0.1, kind=kind), x)


# --- The semi-implicit step -------------------------------------------------------------------------------------------


@every_boundary
@pytest.mark.parametrize("shape", [(4, 5, 2), (1, 2, 1), (3, 1, 1)])
def test_implicit_step_averages_two_exact_solves(double, boundary, shape):
    """Against dense matrices, built from `gradient` alone."""
    x, gamma2, eps = random_image(12, shape), 3.0, 0.2
    differences = gradient(x, boundary=boundary)
    g = 1 / np.sqrt(np.sum(np.asarray(differences) ** 2, axis=-1) + eps**2)
    matrices = np.asarray(jax.jacobian(partial(gradient, boundary=boundary))(jnp.asarray(x)))
    matrices = np.moveaxis(matrices, len(shape), 0).reshape(2, x.size, x.size)
    expected = sum(
        np.linalg.solve(np.eye(x.size) + 2 * gamma2 * d.T @ (g.reshape(-1, 1) * d), x.reshape(-1)) for d in matrices
    )
    ours = implicit_step(x, gamma2=gamma2, eps=eps, boundary=boundary)
    np.testing.assert_allclose(ours, expected.reshape(shape) / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "boundary"), IMPLICIT_PAIRS)
def test_implicit_step_is_stable_for_every_step_size(kind, boundary):
    """In float32, over 24 orders of magnitude of gamma2/eps: averages, so nothing grows and nothing is lost."""

    @given(seed=seeds, log_gamma2=st.floats(-6, 12), log_eps=st.floats(-6, 1))
    def check(seed, log_gamma2, log_eps):
        x = jnp.asarray(random_image(seed, (2, 5, 7, 3)), jnp.float32)
        gamma2, eps = jnp.float32(10.0**log_gamma2), jnp.float32(10.0**log_eps)
        y = compiled_implicit_step(kind, boundary)(x, gamma2, eps)
        low, high = x.min(axis=(1, 2)), x.max(axis=(1, 2))
        if boundary == "dirichlet":
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        slack = 2e-6 * jnp.abs(x).max()  # some 20 roundings along a row
        assert jnp.all((y.min(axis=(1, 2)) >= low - slack) & (y.max(axis=(1, 2)) <= high + slack))
        if boundary != "dirichlet":
            np.testing.assert_allclose(y.mean(axis=(1, 2)), x.mean(axis=(1, 2)), rtol=0, atol=float(slack))

    check()


@pytest.mark.parametrize(("kind", "boundary"), IMPLICIT_PAIRS)
def test_implicit_step_is_the_explicit_one_to_first_order(double, kind, boundary):
    x, bound, eps = compiled_case(13, 0.0, -0.5, 1.0, kind)

    def disagreement(gamma2):
        explicit = compiled_step(kind, boundary)(x, gamma2, eps)[0]
        return jnp.abs(compiled_implicit_step(kind, boundary)(x, gamma2, eps) - explicit).max()

    errors = [float(disagreement(bound * part)) for part in (1e-2, 5e-3, 2.5e-3)]
    np.testing.assert_allclose(orders_of_convergence(errors), 2, atol=0.1)


def test_implicit_step_tends_to_row_and_column_means():
    x = random_image(14, (5, 7, 2)).astype(np.float32)
    expected = (x.mean(axis=0, keepdims=True) + x.mean(axis=1, keepdims=True)) / 2
    np.testing.assert_allclose(implicit_step(x, gamma2=1e12, eps=0.1), expected, rtol=0, atol=1e-5)


# --- As JAX functions -------------------------------------------------------------------------------------------------

OPERATORS = {
    "gradient": gradient,
    "divergence": lambda x: divergence(jnp.stack([x, jnp.sin(x)], axis=-1)),
    "energy": partial(total_variation, eps=0.1),
    "energy per axis": partial(total_variation, eps=0.1, kind="huber"),
    **{f"step {k}": partial(tv_step, gamma2=0.02, eps=0.1, kind=k) for k in ENERGIES},
    "smooth": partial(smooth, gamma2=0.02, eps=0.1, kind="huber", boundary="periodic"),
    "implicit": partial(implicit_step, gamma2=0.5, eps=0.1),
    "implicit periodic": partial(implicit_step, gamma2=0.5, eps=0.1, boundary="periodic"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_eager_jit_and_vmap_agree(name):
    x = jnp.asarray(random_image(15, (2, 5, 7, 3)), jnp.float32)
    eager = OPERATORS[name](x)
    tolerance = 1e-5 if name.startswith("energy") else 1e-6  # energies are sums of 35 terms
    np.testing.assert_allclose(jax.jit(OPERATORS[name])(x), eager, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(jax.vmap(OPERATORS[name])(x), eager, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("step", "kind"),
    [(tv_step, kind) for kind in ENERGIES if kind != "huber"]
    + [(implicit_step, "isotropic"), (implicit_step, "perona_malik_2")],
)
def test_derivatives_of_smooth_steps_are_exact_in_both_modes(double, step, kind):
    """In x, gamma2 and eps.  Huber has a kink, where finite differences say nothing; see the next test."""
    x, gamma2, eps = compiled_case(16, -1.0, -0.5, 0.5, kind, shape=(3, 4, 1))
    check_grads(
        jax.jit(lambda x, gamma2, eps: step(x, gamma2=gamma2, eps=eps, kind=kind)),
        (x, gamma2, eps), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_derivative_of_a_huber_step_diffuses_only_where_differences_are_small():
    x = jnp.array([[0.0, 0.05, 5.0]])[..., None]  # eps = 0.1: a small difference, then an edge
    jacobian = jax.jacobian(partial(tv_step, gamma2=0.025, eps=0.1, kind="huber"))(x)[0, :, 0, 0, :, 0]
    np.testing.assert_allclose(jacobian, [[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0, 1]], atol=1e-6)


def test_second_derivatives_exist(double):
    x = jnp.asarray(random_image(17, (3, 2, 1), 0.1))
    cubed = jax.jit(lambda x: jnp.sum(smooth(x, steps=3, gamma2=0.02, eps=0.3) ** 3))
    check_grads(cubed, (x,), order=2, modes=["rev"], atol=1e-4, rtol=1e-4)
    check_grads(jax.grad(cubed), (x,), order=1, modes=["fwd"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("step", [smooth, implicit_step])
def test_half_precision_is_float32_rounded_once(step, dtype):
    x = jnp.asarray(random_image(18, (5, 7, 3)), dtype)
    y = step(x, gamma2=0.02, eps=0.1)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, step(x.astype(jnp.float32), gamma2=0.02, eps=0.1).astype(dtype))


@every_kind
def test_float32_follows_float64(kind):
    x = random_image(19, (2, 5, 7, 3)).astype(np.float32)
    ours = smooth(x, steps=3, gamma2=0.02, eps=0.1, kind=kind)
    with jax.enable_x64(True):
        exact = smooth(x.astype(np.float64), steps=3, gamma2=0.02, eps=0.1, kind=kind)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6)


def test_traced_step_is_clamped_to_the_stable_interval_and_learns_inside():
    x = jnp.asarray(random_image(20, (5, 7, 1)), jnp.float32)
    loss = jax.jit(lambda gamma2, eps: jnp.sum(tv_step(x, gamma2=gamma2, eps=eps) ** 2))
    slope = jax.grad(loss)
    eps, bound = jnp.float32(0.1), jnp.float32(0.025)
    assert loss(jnp.float32(9.0), eps) == loss(bound, eps)
    assert loss(jnp.float32(-1.0), eps) == loss(jnp.float32(0.0), eps)
    assert slope(jnp.float32(0.01), eps) < 0
    assert slope(bound, eps) < 0
    assert slope(jnp.float32(9.0), eps) == 0
    assert slope(jnp.float32(-1.0), eps) == 0
    assert jnp.isnan(loss(jnp.float32(jnp.nan), eps))
    # A checked number is clamped too when only eps is traced.
    assert jax.jit(lambda eps: jnp.sum(tv_step(x, gamma2=9.0, eps=eps) ** 2))(eps) == loss(bound, eps)


def test_max_stable_step_is_a_quarter_of_eps_or_one_quarter():
    for kind in ("isotropic", "anisotropic", "huber"):
        assert max_stable_step(eps=0.2, kind=kind) == 0.05
    for kind in ("linear", "charbonnier", "perona_malik_1", "perona_malik_2", "weickert"):
        assert max_stable_step(eps=0.2, kind=kind) == 0.25
    assert jax.jit(lambda eps: max_stable_step(eps=eps))(jnp.float32(0.2)) == jnp.float32(0.05)


@pytest.mark.parametrize(("step", "kind"), STEPS)
def test_nan_and_infinity_stay_visible(step, kind):
    for bad in (np.nan, np.inf):
        x = np.zeros((4, 4, 1), np.float32)
        x[1, 1] = bad
        assert not np.isfinite(step(x, gamma2=0.02, eps=0.1, kind=kind)[1, 1, 0])


# --- Bad input --------------------------------------------------------------------------------------------------------

IMAGE = np.zeros((4, 4, 1), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tv_step(IMAGE, gamma2=0.03, eps=0.1), r"`gamma2` \(=0.03\).*0.025.*max_stable_step.*implicit_step"),
        (lambda: smooth(IMAGE, gamma2=0.3, eps=9.0, kind="linear"), r"`gamma2` \(=0.3\).*0.25"),
        (lambda: tv_step(IMAGE, gamma2=-0.1, eps=0.1), r"`gamma2` \(=-0.1\)"),
        (lambda: tv_step(IMAGE, gamma2=float("nan"), eps=0.1), r"`gamma2` \(=nan\)"),
        (lambda: implicit_step(IMAGE, gamma2=float("inf"), eps=0.1), r"`gamma2` \(=inf\)"),
        (lambda: implicit_step(IMAGE, gamma2=-1, eps=0.1), r"`gamma2` \(=-1\)"),
        (lambda: tv_step(IMAGE, gamma2=0.0, eps=0.0), r"`eps` \(=0.0\)"),
        (lambda: total_variation(IMAGE, eps=float("inf")), r"`eps` \(=inf\)"),
        (lambda: max_stable_step(eps=float("nan")), r"`eps` \(=nan\)"),
        (lambda: max_stable_step(eps=1.0, kind="tv"), r"'tv'.*isotropic.*weickert"),
        (lambda: gradient(IMAGE, boundary="reflect"), r"'reflect'.*'neumann'"),
        (lambda: divergence(np.zeros((4, 4, 1, 2), np.float32), boundary="zero"), r"'zero'.*'dirichlet'"),
        (lambda: smooth(IMAGE, steps=-1, gamma2=0.01, eps=0.1), r"`steps` \(=-1\)"),
    ],
)
def test_bad_input_is_named_with_the_limit_and_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def unchecked(function):
    """The function without the annotations that tests enforce, as a user runs it."""
    return getattr(function, "__wrapped__", function)


def test_wrong_shapes_and_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 4\).*H, W, C"):
        unchecked(gradient)(np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"\(4, 4, 1, 3\).*H, W, C, 2"):
        unchecked(divergence)(np.zeros((4, 4, 1, 3), np.float32))


def test_float32_bound_of_a_float32_eps_is_accepted():
    eps = np.float32(0.7)  # 0.69999999: its bound lies below 0.175
    assert tv_step(IMAGE, gamma2=0.175, eps=eps).shape == IMAGE.shape


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(stencils).failed == 0


@pytest.mark.parametrize("shape", [(0, 6, 5, 2), (2, 0, 5, 2), (2, 6, 0, 2), (2, 6, 5, 0)])
@pytest.mark.parametrize("boundary", ["neumann", "periodic", "dirichlet"])
def test_an_image_without_pixels_stays_what_it_is(shape, boundary):
    x, options = jnp.zeros(shape), {"eps": 0.1, "boundary": boundary}
    assert stencils.smooth(x, gamma2=0.01, **options).shape == shape
    assert stencils.implicit_step(x, gamma2=0.1, **options).shape == shape
    assert stencils.divergence(stencils.gradient(x, boundary=boundary), boundary=boundary).shape == shape
    np.testing.assert_array_equal(stencils.total_variation(x, **options) >= 0, np.ones((shape[0], shape[3]), bool))
