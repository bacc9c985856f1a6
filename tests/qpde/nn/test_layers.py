"""Layers of qpde.nn: their formulas, their promises, and that they compose."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qpde import operators, stencils, testing
from qpde.bits import Bits
from qpde.models import Smoothing
from qpde.models.images.parts import Factors
from qpde.nn import QuantActivation, QuantConv, QuantDense, QuantDepthwise, SymmetricStep, TVSmoothing
from qpde.norms import spectral_norm
from qpde.quantizers import quantize_activation, quantize_weight


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(0, 4, 8, 8, 3)


@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (QuantDense(5, weights=3, activations=4), lambda x, k: x @ k),
        (QuantConv(5, stride=2, weights=3, activations=4), partial(operators.conv, stride=2)),
        (QuantConv(5, (1, 5), dilation=2, weights=3, activations=4), partial(operators.conv, dilation=2)),
        (QuantDepthwise(padding=0, weights=3, activations=4), partial(operators.depthwise, padding=0)),
    ],
)
def test_a_layer_is_its_operator_on_rounded_numbers_plus_an_exact_bias(layer, linear):
    variables = layer.init(jax.random.key(0), X)
    params = variables["params"]
    assert params["weight_clips"] == jnp.abs(params["kernel"]).max()
    params["bias"] = normal(1, *params["bias"].shape)
    kernel = quantize_weight(params["kernel"], params["weight_clips"], 3)
    expected = linear(quantize_activation(X, 6.0, 4, signed=True), kernel) + params["bias"][None, None, None]
    np.testing.assert_allclose(layer.apply(variables, X), expected, rtol=1e-5, atol=1e-5)
    exact = linear(X, params["kernel"]) + params["bias"][None, None, None]
    np.testing.assert_allclose(layer.apply(variables, X, bits=Bits()), exact, rtol=1e-5, atol=1e-5)
    without = layer.clone(use_bias=False)
    assert "bias" not in without.init(jax.random.key(0), X)["params"]


def test_clips_may_be_one_for_each_channel():
    layer = QuantConv(5, per_channel=True, weights=3)
    params = layer.init(jax.random.key(0), X)["params"]
    np.testing.assert_array_equal(params["weight_clips"], jnp.abs(params["kernel"]).max((0, 1, 2)))


def test_an_activation_is_smoothed_then_rounded():
    smoothing = Smoothing(kind="huber", steps=2, gamma2=0.02)
    layer = QuantActivation(activations=3, signed=False, smoothing=smoothing)
    expected = stencils.smooth(X, steps=2, gamma2=0.02, eps=0.1, kind="huber")
    variables = layer.init(jax.random.key(0), X)
    np.testing.assert_array_equal(layer.apply(variables, X), quantize_activation(expected, 6.0, 3))


@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
def test_smoothing_is_the_stencils_and_its_step_is_learned_as_a_share_of_the_largest(boundary):
    layer = TVSmoothing(Smoothing(gamma2=0.02, learned=True), boundary)
    variables = layer.init(jax.random.key(0), X)
    np.testing.assert_allclose(variables["params"]["gamma2_share"], 0.8)
    expected = stencils.tv_step(X, gamma2=0.02, eps=0.1, boundary=boundary)
    np.testing.assert_allclose(layer.apply(variables, X), expected, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda v: jnp.sum(layer.apply(v, X) ** 2))(variables)["params"]["gamma2_share"]
    assert slope < 0  # smoothing takes energy away
    assert "params" not in TVSmoothing().init(jax.random.key(0), X)


# --- Symmetric steps --------------------------------------------------------------------------------------------------


def settled(layer, seed=0, gain=1.0):
    """Variables in which everything differs from its start, with statistics of X and converged norms."""
    variables = layer.init(jax.random.key(seed), X)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: jnp.asarray(p * rng.uniform(0.5, 2, p.shape) + 0.1 * rng.standard_normal(p.shape), jnp.float32),
        variables["params"],
    )
    params["block0"]["kernel1"] = gain * params["block0"]["kernel1"]
    variables = {**variables, "params": params}
    collections = [name for name in ("batch_stats", "spectral") if name in variables]
    _, updates = layer.apply(variables, X, train=True, momentum=0.0, power_iterations=300, mutable=collections)
    return {**variables, **updates}


@pytest.mark.parametrize("norm", ["separate", "tied", "spectral"])
def test_a_step_is_its_formula(norm):
    layer = SymmetricStep(hidden=5, norm=norm, step_size=0.2)
    variables = settled(layer)
    params, stats = (variables[k]["block0"] for k in ("params", "batch_stats"))
    kernel, gain, bias = params["kernel1"][0], params["norm1"]["scale"][0], params["norm1"]["bias"][0]
    hidden = operators.conv(X, kernel)
    mean = stats["norm1"]["mean"][0]
    if norm == "spectral":
        scaled = spectral_norm(lambda x: operators.conv(x, kernel) * gain[None, None, None], (1, *X.shape[1:]),
                               iterations=300, key=jax.random.key(9))  # fmt: skip
        d, h = gain * jnp.sqrt(1.9) / scaled, 1.0
    else:
        d, h = gain / jnp.sqrt(stats["norm1"]["var"][0] + 1e-5), 0.2
    z = jax.nn.relu((hidden - mean[None, None, None]) * d[None, None, None] + bias[None, None, None])
    if norm == "separate":
        y = operators.conv_adjoint(z, kernel)
        second = stats["norm2"]
        y = (y - second["mean"][0][None, None, None]) / jnp.sqrt(second["var"][0] + 1e-5)[None, None, None]
        y = y * params["norm2"]["scale"][0][None, None, None] + params["norm2"]["bias"][0][None, None, None]
    else:
        y = operators.conv_adjoint(z * d[None, None, None], kernel)
    np.testing.assert_allclose(layer.apply(variables, X), X - h * y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "spectral"},
        {"norm": "spectral", "steps": 3, "lipschitz_target": 1.0},
        {"norm": "tied", "step_size": "auto"},
    ],
)
@pytest.mark.parametrize("gain", [0.1, 30.0])
def test_spectral_and_automatic_steps_are_non_expansive_whatever_is_learned(options, gain):
    layer = SymmetricStep(**options)
    layer_variables = layer.init(jax.random.key(1), X)
    params = jax.tree.map(lambda p: p, layer_variables["params"])
    (name,) = params
    params[name]["kernel1"] = gain * params[name]["kernel1"]
    _, updates = layer.apply({**layer_variables, "params": params}, X, train=True, momentum=0.0, power_iterations=300,
                             mutable=["batch_stats", "spectral"])  # fmt: skip
    variables = {**layer_variables, "params": params, **updates}
    testing.check_non_expansive(partial(layer.apply, variables), (1, 8, 8, 3), tolerance=1e-4, trials=6)


def test_the_published_step_is_not_and_the_check_finds_it():
    layer = SymmetricStep(norm="separate", step_size=1.0)
    variables = settled(layer, gain=3.0)
    with pytest.raises(AssertionError, match="expansive"):
        testing.check_non_expansive(partial(layer.apply, variables), (1, 8, 8, 3))


def test_a_stack_of_steps_is_its_steps_one_after_the_other():
    layer, one = SymmetricStep(steps=3, loop="scan", weights=4, activations=5), SymmetricStep(weights=4, activations=5)
    variables = layer.init(jax.random.key(2), X)
    x = X
    for i in range(3):
        own = {
            k: {"block0": jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], t["blocks0to2"])}
            for k, t in variables.items()
        }
        x = one.apply(own, x)
    np.testing.assert_allclose(layer.apply(variables, X), x, rtol=1e-5, atol=1e-5)


def test_bad_options_are_refused_by_name_and_value():
    for options, message in (
        ({"norm": "batch"}, "norm .='batch'."),
        ({"residual": "none"}, "residual .='none'."),
        ({"lipschitz_target": 2.5}, "lipschitz_target .=2.5."),
        ({"taps": 4}, "taps .=4."),
        ({"steps": 0}, "steps .=0."),
        ({"step_size": "auto"}, "step_size .='auto'."),
        ({"step_size": -1.0}, "step_size .=-1.0."),
        ({"smoothing": Smoothing(learned=True)}, "does not learn its smoothing"),
        ({"levels": "log"}, "'log'"),
    ):
        with pytest.raises(ValueError, match=message):
            SymmetricStep(**options).init(jax.random.key(0), X)


# --- Composition ------------------------------------------------------------------------------------------------------


FOUR = Bits(4, 4)


class Body(nn.Module):
    """All layers in one step, as the body of a scan."""

    @nn.compact
    def __call__(self, x, train, bits):
        x = SymmetricStep()(x, train=train, bits=bits)
        y = QuantConv(6)(x, bits=bits)
        y = QuantDepthwise()(TVSmoothing(Smoothing(learned=True))(nn.relu(y)), bits=bits)
        y = QuantDense(3)(QuantActivation(signed=False)(nn.relu(y), bits=bits), bits=bits)
        return x + 0.1 * y, None


class Deep(nn.Module):
    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train=False, bits=FOUR):
        body = nn.remat(Body, static_argnums=(2,)) if self.remat else Body
        if self.scan:
            axes = {"params": 0, "batch_stats": 0, "spectral": 0}
            scanned = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=2)
            return scanned(name="steps")(x, train, bits)[0]
        for i in range(2):
            x, _ = body(name=f"step{i}")(x, train, bits)
        return x


@pytest.fixture(scope="module")
def scanned():
    variables = jax.jit(Deep(scan=True).init)(jax.random.key(3), X)
    unrolled = {k: {f"step{i}": jax.tree.map(lambda leaf, i=i: leaf[i], t["steps"]) for i in range(2)}
                for k, t in variables.items()}  # fmt: skip
    return variables, unrolled


def trained(model, variables):
    """Loss in four bits; updates and gradients of one pass of training without rounding, which is continuous."""

    def loss(params, bits):
        mutable = ["batch_stats", "spectral"]
        out, updates = model.apply({**variables, "params": params}, X, train=True, bits=bits, mutable=mutable)
        return jnp.sum(out**2), updates

    @jax.jit
    def run(params):
        (_, updates), grads = jax.value_and_grad(loss, has_aux=True)(params, Bits())
        return loss(params, Bits(4, 4))[0], {**updates, "grads": grads}

    return run(variables["params"])


@pytest.mark.parametrize("remat", [False, True])
def test_layers_compose_inside_scan_and_remat_with_their_gradients_and_statistics(scanned, remat):
    variables, unrolled = scanned
    loss, updates = trained(Deep(scan=True, remat=remat), variables)
    expected, updates_u = trained(Deep(scan=False), unrolled)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    assert sorted(updates) == ["batch_stats", "grads", "spectral"]
    for name, found in updates.items():
        for i in range(2):
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-3 * np.abs(b).max()),
                found["steps"],
                updates_u[name][f"step{i}"],
            )


def test_vmap_and_shard_map_run_them_as_they_are(scanned):
    _, variables = scanned
    model = Deep(scan=False)
    expected = model.apply(variables, X)
    mapped = jax.jit(jax.vmap(lambda x: model.apply(variables, x[None])[0]))(X)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    apply = jax.jit(jax.shard_map(model.apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
    np.testing.assert_allclose(apply(variables, X), expected, rtol=1e-4, atol=1e-4)


def test_bits_are_traced():
    layer = QuantDense(2, weights=4, activations=4)
    variables = layer.init(jax.random.key(0), X)
    at = jax.jit(lambda bits: layer.apply(variables, X, bits=Bits(bits, bits)))
    for width in (2, 5, 32):
        np.testing.assert_allclose(
            at(jnp.int32(width)), layer.apply(variables, X, bits=Bits(width, width)), rtol=1e-5, atol=1e-6
        )
    assert at._cache_size() == 1


# --- As a part of an image network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["rounded", "precise"])
def test_without_a_kernel_a_step_rounds_or_clips_its_input_as_the_residual_says(residual):
    layer = SymmetricStep(norm="tied", activations=3, residual=residual)
    variables = layer.init(jax.random.key(0), X)
    variables["params"]["block0"]["kernel1"] *= 0
    expected = quantize_activation(X, 6.0, 3 if residual == "rounded" else 32, signed=True)
    np.testing.assert_allclose(layer.apply(variables, X), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("residual", ["rounded", "precise"])
def test_the_part_of_a_step_has_proven_constants_that_hold(residual):
    """A user's own chain of parts is certified from these: Lipschitz constant and error of rounding."""
    layer = SymmetricStep(hidden=5, weights=4, activations=4, residual=residual)
    variables = settled(layer)
    part, bits = layer.block(3), Bits(4, 4)
    own = {name: jax.tree.map(lambda leaf: leaf[0], tree["block0"]) for name, tree in variables.items()}
    kernels, scales, step_size = jax.device_get(part.factors(own, 1.0, bits))
    bound = part.step_bound(Factors(kernels, scales, step_size, own["params"]["act_clips"]), bits, (8, 8))
    assert bound.lipschitz == pytest.approx(1)
    apply = jax.jit(layer.apply)
    low, twin = apply(variables, X, bits=bits), apply(variables, X, bits=Bits(4, 32))
    errors = jnp.linalg.norm((low - twin).reshape(4, -1), axis=1)
    assert 0 < errors.max() < bound.injected
