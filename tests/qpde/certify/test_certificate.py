"""Certificates: proven norms, constants of steps, and bounds that no input exceeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpde import Bits, models
from qpde.certify import certificate
from qpde.certify.certificate import certify, exact_twin
from qpde.certify.step_bounds import in_float64, step_bound, step_bounds
from qpde.kernel_norms import conv_norm_bound, conv_norm_is_at_most, depthwise_norm_bound
from qpde.measure.jacobians import jacobian_spectrum
from qpde.models.images.blocks import BasicBlock, StableBlock
from qpde.models.images.network import BoundPart
from qpde.models.layers import Mode
from qpde.operators import conv, depthwise
from qpde.stencils import ENERGIES

# Proven norms.

SEEDS = st.integers(0, 2**31)


def dense_norm(operator, kernel, size, channels, **options):
    units = jnp.eye(channels * size[0] * size[1]).reshape(-1, *size, channels)
    matrix = np.asarray(operator(units, jnp.asarray(kernel), **options), np.float64).reshape(len(units), -1)
    return np.linalg.norm(matrix, 2)


def random_kernel(seed, shape):
    """From smooth, whose largest frequency is the lowest, to rough."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + rng.uniform(0, 2) * rng.standard_normal((1, 1, *shape[2:]))).astype(np.float32)


@given(seed=SEEDS, padding=st.sampled_from([None, 0]))
def test_the_norm_of_a_convolution_is_bounded_and_located_exactly(seed, padding):
    kernel = random_kernel(seed, (3, 3, 2, 3))
    norm = dense_norm(conv, kernel, (5, 4), 2, padding=padding)
    assert norm <= conv_norm_bound(kernel) <= 1.2 * dense_norm(conv, kernel, (12, 12), 2)
    assert conv_norm_is_at_most(kernel, norm * (1 + 1e-5), (5, 4), padding=padding)
    assert not conv_norm_is_at_most(kernel, norm * (1 - 1e-5), (5, 4), padding=padding)


@given(seed=SEEDS)
def test_the_symbol_bounds_strides_and_depthwise_kernels_too(seed):
    kernel = random_kernel(seed, (3, 3, 2, 3))
    assert dense_norm(conv, kernel, (6, 6), 2, stride=2) <= conv_norm_bound(kernel)
    kernel = random_kernel(seed, (3, 3, 1, 3))
    assert dense_norm(depthwise, kernel, (6, 6), 3) <= depthwise_norm_bound(kernel)
    kernel = random_kernel(seed, (1, 1, 4, 3))
    np.testing.assert_allclose(conv_norm_bound(kernel), np.linalg.norm(kernel[0, 0], 2), rtol=1e-6)


@given(seed=SEEDS, taps=st.sampled_from([(1, 3), (3, 1), (5, 1), (1, 1)]))
def test_an_axis_with_one_tap_needs_one_frequency(seed, taps):
    kernel = random_kernel(seed, (*taps, 2, 3))
    assert dense_norm(conv, kernel, (6, 5), 2) <= conv_norm_bound(kernel) * (1 + 1e-6)  # the convolution is in float32
    square = np.zeros((max(taps), max(taps), 2, 3), np.float32)
    middle = tuple(slice((max(taps) - t) // 2, (max(taps) + t) // 2) for t in taps)
    square[middle] = kernel
    # The same convolution, its symbol taken at all frequencies of both axes. Only the factor between them differs.
    aliasing = np.prod([np.cos(np.pi * (t - 1) / 64) for t in taps]) / np.cos(np.pi * (max(taps) - 1) / 64) ** 2
    np.testing.assert_allclose(conv_norm_bound(square), conv_norm_bound(kernel) * aliasing, rtol=1e-9)


def test_few_frequencies_still_give_a_bound():
    for seed in range(10):
        kernel = np.random.default_rng(seed).standard_normal((3, 3, 2, 2)).astype(np.float32)
        *few, many = (conv_norm_bound(kernel, points=n) for n in (4, 5, 8, 256))
        assert min(few) >= 0.9999 * many  # which is itself at most 0.015 % above the largest
    with pytest.raises(ValueError, match=r"points.*=3.*exceed"):
        conv_norm_bound(kernel, points=3)


NORMS = [conv_norm_bound, depthwise_norm_bound, functools.partial(conv_norm_is_at_most, bound=1.0, size=(4, 4))]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.full((3, 3, 1, 1), np.nan), "NaN or infinite"),
        (np.full((1, 1, 1, 1), np.inf), "NaN or infinite"),
        (np.ones((2, 3, 1, 1)), r"even size \(2, 3\)"),
    ],
)
def test_nothing_is_proven_of_kernels_without_a_norm_or_a_middle(norm, kernel, message):
    with pytest.raises(ValueError, match=message):
        norm(kernel.astype(np.float32))


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_no_norm_is_at_most_a_negative_number(bound):
    with pytest.raises(ValueError, match=r"`bound` \(=.*\) must be at least 0"):
        conv_norm_is_at_most(np.zeros((1, 1, 1, 1), np.float32), bound, (4, 4))


# Networks.

NETWORKS = {
    "spectral, precise": ("stablenet20", {"norm": "spectral", "residual": "precise"}),
    "tied, auto, scaled head": ("stablenet20", {"norm": "tied", "step_size": "auto", "head": "scaled"}),
    "separate": ("resnet20", {"symmetric": True}),
    "plain": ("resnet20", {"symmetric": False}),
    "mobile, plain": ("mobilenetv2", {"symmetric": False}),
    "mobile, spectral": ("mobilenetv2", {"norm": "spectral", "signed_inputs": True}),
    "smoothed, powers of two": (
        "stablenet20",
        {"norm": "spectral", "levels": "pot", "smoothing": models.Smoothing(output=True)},
    ),
}
COLLECTIONS = ["batch_stats", "spectral"]


@functools.cache
def network(kind):
    """Two stages, random norms, and a function of a seed that makes its variables."""
    name, options = NETWORKS[kind]
    model = models.create(name, num_classes=5, weight_bits=4, act_bits=4, **options)
    model = model.clone(architecture=model.architecture.with_blocks(2, 2))

    @jax.jit
    def init(key):
        x = images(8, key)
        variables = model.init(key, x)
        params = jax.tree_util.tree_map_with_path(functools.partial(perturbed, key), variables["params"])
        moved = model.apply(
            {**variables, "params": params}, x, train=True, momentum=0.0, power_iterations=30, mutable=COLLECTIONS
        )[1]
        return {**variables, **moved, "params": params}

    def converged(key):
        return models.converge_norms(model, init(key), images(1, key), bits=Bits(4, 4))

    return model, converged


def perturbed(key, path, leaf):
    where = jax.tree_util.keystr(path)
    noise = jax.random.normal(jax.random.fold_in(key, len(where) + leaf.size), leaf.shape)
    if "norm" in where and "'scale'" in where:
        return jnp.exp(0.5 * noise)
    if "norm" in where and "'bias'" in where:
        return 0.5 * noise
    return leaf * 0.3 if "act_clips" in where else leaf


def images(n, key):
    return jax.random.normal(jax.random.fold_in(key, 7), (n, 8, 8, 3))


@functools.partial(jax.jit, static_argnames="model")
def run(model, variables, x, bits):
    return model.apply(variables, x, bits=bits, return_states=True)


def both(model, variables, x, bits):
    """Logits and states of the network and of its twin: one program, of other bits."""
    return run(model, variables, x, bits), run(model, variables, x, bits.twin)


def check(model, variables, x, bits, newton_steps=2):
    """Every claim of a certificate against the twin itself; the sizes of bound and difference."""
    found = certify(model, variables, x, bits, newton_steps=newton_steps)
    (logits, states), (logits_twin, states_twin) = both(model, variables, x, Bits(*map(jnp.int32, bits)))
    moved = [np.sqrt(np.square(a - b).sum((1, 2, 3))) for a, b in zip(states, states_twin, strict=True)]
    assert (np.stack(moved, 1) <= found.state_bound * (1 + 1e-4) + 1e-5).all()
    i = np.argmax(logits, -1)
    np.testing.assert_array_equal(found.prediction, i)
    twin = exact_twin(model, variables, x, bits)
    np.testing.assert_allclose(logits_twin, twin, atol=1e-4 * np.abs(twin).max())
    pairs = [np.take_along_axis(np.float64(z), i[:, None], 1) - z for z in (found.logits, twin)]
    difference, scale = np.abs(pairs[0] - pairs[1]), np.abs(logits).max()
    assert (difference <= found.bound + 1e-9 * scale).all()
    assert (difference <= found.bound_a_priori + 1e-4 * scale).all()  # the run itself is one of float32
    agrees = np.argmax(twin, -1) == i
    assert agrees[found.certified].all()
    assert agrees[found.certified_a_priori].all()
    return found, difference, (logits, twin)


@pytest.mark.parametrize("kind", list(NETWORKS)[1:])  # more of the first one below
@settings(max_examples=4)
@given(
    seed=SEEDS,
    weights=st.integers(2, 8),
    activations=st.sampled_from([2, 3, 4, 6, 8]),
    newton_steps=st.sampled_from([None, 0, 1, 2]),
)
def test_no_input_moves_by_more_than_its_bound(kind, seed, weights, activations, newton_steps):
    model, init = network(kind)
    key = jax.random.key(seed)
    check(model, init(key), images(4, jax.random.fold_in(key, 1)), Bits(weights, activations), newton_steps)


def test_every_sweep_tightens_the_bound_and_one_for_each_step_leaves_the_difference():
    model, init = network("spectral, precise")
    variables, x = init(jax.random.key(0)), images(4, jax.random.key(1))
    tightness = []
    for newton_steps in (0, 1, 2, 4):
        found, difference, _ = check(model, variables, x, Bits(4, 4), newton_steps)
        tightness.append(float(np.median(found.bound[difference > 0] / difference[difference > 0])))
    assert tightness[0] > 1.5 * tightness[1] > 2 * tightness[2]
    # The proof sees as little of float32 as the twin itself.
    np.testing.assert_allclose(tightness[3], 1, rtol=1e-9)
    assert found.defect.max() < 1e-12
    # Without steps the candidate is the twin itself.
    found, difference, (logits, twin) = check(model, variables, x, Bits(4, 4), None)
    np.testing.assert_allclose(found.bound, difference, rtol=1e-9)
    assert found.defect.max() == 0
    np.testing.assert_array_equal(found.certified, logits.argmax(-1) == twin.argmax(-1))
    np.testing.assert_allclose(found.estimate, twin, rtol=1e-12)


@pytest.mark.parametrize("kind", ["spectral, precise", "plain"])
def test_products_of_the_twin_of_a_proof_are_of_float64(kind):
    model, init = network(kind)
    variables, x, bits = init(jax.random.key(0)), images(4, jax.random.key(1)), Bits(4, 4)
    rounded = certificate.rounded_parts(model, variables, bits)
    with in_float64():
        program = certificate._exact_twin.lower(model, variables, rounded, x, bits).as_text()
    kinds = ("stablehlo.convolution", "dot_general", "@qpde_")
    products = [line for line in program.splitlines() if any(kind in line for kind in kinds)]
    assert len(products) > 8
    assert all("xf64>" in line and "xf32>" not in line for line in products)


def test_the_estimate_of_one_sweep_is_close_at_eight_bits():
    model, init = network("spectral, precise")
    x = images(4, jax.random.key(1))
    found, _, (logits, twin) = check(model, init(jax.random.key(0)), x, Bits(4, 8), newton_steps=1)
    error = jnp.linalg.norm(found.estimate - twin) / jnp.linalg.norm(logits - twin)
    assert error < 0.1


def test_enough_bits_certify_everything_and_sixteen_change_nothing():
    model, init = network("spectral, precise")
    variables, x = init(jax.random.key(0)), images(4, jax.random.key(1))
    found, _, _ = check(model, variables, x, Bits(4, 15))
    assert found.certified_fraction == 1
    found, _, (logits, _) = check(model, variables, x, Bits(4, 16))
    assert bool(found.certified_a_priori.all())
    assert found.certified_fraction == 1
    assert float(found.bound_a_priori.max()) == 0
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)


def test_one_width_per_block_is_the_bound_of_each():
    model, init = network("spectral, precise")
    variables = init(jax.random.key(0))
    mixed = step_bounds(model, variables, (8, 8), Bits(4, (2, 4, 8, 4)))
    for index, bits in enumerate((2, 4, 8, 4)):
        assert mixed.bounds[index] == step_bounds(model, variables, (8, 8), Bits(4, bits)).bounds[index]
    x, widths = images(4, jax.random.key(1)), Bits(4, jnp.array([2, 4, 8, 4]))
    check(model, variables, x, widths)
    as_list = Bits(4, [2, 4, 8, 4])
    np.testing.assert_array_equal(exact_twin(model, variables, x, as_list), exact_twin(model, variables, x, widths))
    found, expected = (certify(model, variables, x, bits, newton_steps=2, steps=mixed) for bits in (as_list, widths))
    np.testing.assert_array_equal(found.bound, expected.bound)
    for f in (certify, exact_twin):
        with pytest.raises(ValueError, match="one for each of the 4 blocks"):
            f(model, variables, x, Bits(4, [4, 4]))


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("network", lambda model, variables, x, bits: (model.with_options(residual="precise"), variables, x, bits)),
        ("image size", lambda model, variables, x, bits: (model, variables, x[:, :6], bits)),
        ("bits", lambda model, variables, x, bits: (model, variables, x, Bits(4, 5))),
        ("variables", lambda model, variables, x, bits: (model, jax.tree.map(lambda v: 1.01 * v, variables), x, bits)),
    ],
)
def test_constants_of_something_else_prove_nothing(what, changed):
    model, init = network("plain")
    given = (model, init(jax.random.key(0)), images(2, jax.random.key(1)), Bits(4, 4))
    steps = step_bounds(*given[:2], (8, 8), given[3])
    with pytest.raises(ValueError, match=f"constants of another {what}"):
        certify(*changed(*given), steps=steps)


# Constants.


def constants_with_smoothing(smoothing):
    variables = network("spectral, precise")[1](jax.random.key(0))
    smoothed = models.create("stablenet20", num_classes=5, norm="spectral", residual="precise", smoothing=smoothing)
    smoothed = smoothed.clone(architecture=smoothed.architecture.with_blocks(2, 2))
    return [step.lipschitz for step in step_bounds(smoothed, variables, (8, 8), Bits(4, 4)).bounds]


def test_smoothing_costs_the_blocks_that_smooth_their_constant_and_no_others():
    everywhere = constants_with_smoothing(models.Smoothing())
    one = constants_with_smoothing(models.Smoothing(blocks=(1,)))
    without = constants_with_smoothing(None)
    assert one == [without[0], everywhere[1], *without[2:]]
    assert everywhere[0] > 2 > without[0]


@pytest.mark.parametrize("kind", [name for name, kind in ENERGIES.items() if not kind.convex])
def test_smoothing_that_can_amplify_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind}.*isotropic"):
        constants_with_smoothing(models.Smoothing(kind=kind, output=True))


def test_a_network_in_bfloat16_is_refused():
    model, init = network("spectral, precise")
    variables, x = init(jax.random.key(0)), images(1, jax.random.key(1))
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        certify(model.with_options(compute_dtype="bfloat16"), variables, x, Bits(4, 4))


def test_the_logits_bound_is_the_distance_seen_through_pooling_and_head():
    model, init = network("spectral, precise")
    variables, x = init(jax.random.key(0)), images(4, jax.random.key(1))
    found = certify(model, variables, x, Bits(4, 4), newton_steps=0)
    _, states = model.apply(variables, x, bits=Bits(4, 4), return_states=True)
    w = np.asarray(variables["params"]["head"]["kernel"])
    pairs = np.linalg.norm(w.T[found.prediction][:, None] - w.T[None], axis=-1) / np.sqrt(states[-1][0, :, :, 0].size)
    total = 0.0
    for step in step_bounds(model, variables, (8, 8), Bits(4, 4)).bounds:
        total = step.lipschitz * total + step.injected
    np.testing.assert_allclose(found.bound_a_priori, pairs * total, rtol=1e-4, atol=1e-6)

    # A posteriori the last step's error is known with its sign: its part of the logits is added as it is.
    entering, leaving = np.split(np.asarray(found.state_bound)[:, -2:], 2, axis=1)
    entering = entering * found.lipschitz[-1]
    known = np.asarray(found.bound) - pairs * entering
    assert (known > -1e-5).all()
    assert (known <= pairs * (leaving - entering) + 1e-5).all()
    # A difference along w_i - w_k, the same at all pixels, attains the bound.
    i, k, (height, width) = 0, 1, states[-1].shape[1:3]
    worst = np.broadcast_to(w[:, i] - w[:, k], (height, width, len(w)))
    worst = worst / np.linalg.norm(worst)
    attained = worst.mean((0, 1)) @ (w[:, i] - w[:, k])
    np.testing.assert_allclose(attained, np.linalg.norm(w[:, i] - w[:, k]) / np.sqrt(height * width), rtol=1e-5)


@pytest.mark.parametrize("residual", ["rounded", "precise"])
def test_constants_of_steps_whose_kernels_are_multiples_of_the_identity(residual):
    """K1 = a I, K2 = b I: relu(x - b Q2(relu(a Q1(x)))), with 3 channels on 4x5 pixels, 4 bits and clips 2 and 3."""
    a, b, bits, (height, width, channels) = 0.7, 1.5, Bits(32, 4), (4, 5, 3)
    identity = np.zeros((3, 3, channels, channels), np.float32)
    identity[1, 1] = np.eye(channels)
    unit = {"scale": jnp.full(channels, np.sqrt(1 + 1e-5)), "bias": jnp.zeros(channels)}
    still = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
    first, second = (clip / 2 / 15 * np.sqrt(height * width * channels) for clip in (2, 3))
    kernels = {"kernel1": a * identity, "kernel2": b * identity}
    a, b = (c * conv_norm_bound(identity) for c in (a, b))  # what is proven of them, a per cent more
    own = {
        "params": {
            **kernels,
            "norm1": unit,
            "norm2": unit,
            "weight_clips": jnp.full(2, 9.0),
            "act_clips": jnp.array([2.0, 3.0]),
        },
        "batch_stats": {"norm1": still, "norm2": still},
    }

    def bound(kind, step_size=1.0, **options):
        options = {"width_in": channels, "width_out": channels, "stride": 1, "symmetric": False} | options
        block = kind(**options, residual=residual, standardize=False)
        return step_bound(BoundPart(block, own, step_size, None, bits), (height, width))

    shortcut = first if residual == "rounded" else 0
    plain = (1 + a * b, b * (a * first + second) + shortcut)
    np.testing.assert_allclose(bound(BasicBlock), plain, rtol=1e-5)
    np.testing.assert_allclose(bound(StableBlock), plain, rtol=1e-5)
    np.testing.assert_allclose(bound(StableBlock, stride=2), np.divide(plain, 2), rtol=1e-5)
    grown = np.hypot(plain, (1, shortcut))
    np.testing.assert_allclose(bound(StableBlock, stride=2, width_out=2 * channels), grown / 2, rtol=1e-5)
    # One kernel on both sides, h = 1: the tied step's Jacobian is 1 - a^2 or 1.
    branch = a * (a * first + second)
    symmetric = (
        1,
        min(branch + first, first + a * second) if residual == "rounded" else branch,
    )
    np.testing.assert_allclose(bound(BasicBlock, symmetric=True, norm="tied"), symmetric, rtol=1e-5)
    separate = (1 + a * a, branch + shortcut)
    np.testing.assert_allclose(bound(BasicBlock, symmetric=True), separate, rtol=1e-5)


@pytest.mark.parametrize("kind", ["spectral, precise", "tied, auto, scaled head"])
def test_steps_of_a_bounded_norm_have_the_constant_one_by_proof(kind):
    model, init = network(kind)
    for seed in range(3):
        bounds = step_bounds(model, init(jax.random.key(seed)), (8, 8), Bits(4, 4))  # what the norms converged at
        np.testing.assert_allclose([b.lipschitz for b in bounds.bounds], [1, 1, np.sqrt(0.5), 1])


def test_without_a_proof_of_the_step_size_the_constant_is_above_one():
    model, init = network("tied, auto, scaled head")
    fixed = model.with_options(step_size=4.0)
    variables = {k: v for k, v in init(jax.random.key(0)).items() if k != "spectral"}
    assert all(b.lipschitz > 1 for b in step_bounds(fixed, variables, (8, 8), Bits(4, 4)).bounds)


def spectra(kind, *, is_open=False):
    """Of the last twin step's Jacobian at random points of 4x4 pixels, with random or with open ReLUs."""
    model, init = network(kind)
    block, own, step_size, gamma2 = model.steps(init(jax.random.key(3)))[-1]
    size = 4
    if is_open:
        params = own["params"]
        norm = params["norm1"] | {"bias": jnp.full_like(params["norm1"]["bias"], 30.0)}
        own = {**own, "params": params | {"norm1": norm, "act_clips": jnp.full_like(params["act_clips"], 1e3)}}
    if "spectral" in own:
        start = jax.jit(block.initial_spectral, static_argnums=(2, 3))
        own = {**own, "spectral": start(jax.random.key(0), own["params"], size, size)}

    @jax.jit
    def spectrum(x):
        mode = Mode(power_iterations=100)
        return jacobian_spectrum(lambda x: block(own, x, step_size, Bits(4, 32), mode, gamma2)[0], x)

    return [spectrum(jax.random.normal(jax.random.key(i), (1, size, size, block.width_in))) for i in range(3)]


def assert_between_minus_one_and_one(found):
    for eigenvalues, singular_values in found:
        assert float(eigenvalues[0]) >= -1 - 1e-4
        assert float(eigenvalues[-1]) <= 1 + 1e-4
        assert float(singular_values[0]) <= 1 + 1e-4


@pytest.mark.parametrize("kind", ["spectral, precise", "tied, auto, scaled head"])
def test_jacobians_of_tied_steps_lie_between_minus_one_and_one(kind):
    assert_between_minus_one_and_one(spectra(kind))


def test_where_all_units_are_open_the_spectrum_reaches_its_end():
    """Without a ReLU at its end the step is x - h A^T (A x + b) there, with eigenvalues from 1 - 1.9 on."""
    found = spectra("mobile, spectral", is_open=True)
    assert_between_minus_one_and_one(found)
    np.testing.assert_allclose([float(s.eigenvalues[0]) for s in found], -0.9, atol=0.02)


@pytest.mark.parametrize("kind", ["separate", "plain"])
def test_jacobians_of_plain_steps_and_of_separate_norms_do_not(kind):
    assert max(float(s.singular_values[0]) for s in spectra(kind)) > 1.02


# What is refused.


def test_bad_input_is_refused_with_the_way_out():
    model, init = network("plain")
    variables, x = init(jax.random.key(0)), images(1, jax.random.key(1))
    with pytest.raises(ValueError, match=r"bits.activations.*give some"):
        certify(model, variables, x, Bits(4, None))
    with pytest.raises(ValueError, match=r"newton_steps.*=-1.*at least 0"):
        certify(model, variables, x, Bits(4, 4), newton_steps=-1)
