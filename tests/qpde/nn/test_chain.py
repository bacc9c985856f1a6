"""Certificates of a user's own chain of parts: no bound is ever exceeded, and what is not proven is refused."""

import functools
import math
from inspect import unwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import qpde
from qpde import certify, measure, models, ptq
from qpde.bits import Bits
from qpde.certify import step_bounds
from qpde.certify.step_bounds import in_float64, to_float64
from qpde.nn import Chain, Proven, QuantConv, QuantDense, QuantDepthwise, SymmetricStep, flatten, global_mean, quantized

ALL = qpde.Rule("", weights=4, activations=4, signed=True)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


IMAGES = normal(0, 6, 8, 8, 3)


class Halved(nn.Module):
    """An own layer that says what is proven of it."""

    def lipschitz(self, variables, shape):
        return float(np.abs(variables["params"]["scale"])) / math.sqrt(shape[0])

    @nn.compact
    def __call__(self, x):
        return self.param("scale", nn.initializers.constant(0.5), ()) * x.mean(1)


def layers_of(kind):
    smoothing = models.Smoothing(gamma2=0.02)
    return {
        "steps": (
            QuantConv(6, weights=4, activations=4, stride=2, smoothing=smoothing),
            nn.BatchNorm(),
            nn.relu,
            SymmetricStep(steps=2, weights=4, activations=4, residual="precise"),
            global_mean,
            nn.Dense(4),
        ),
        "rules": (
            nn.Conv(6, (2, 3), strides=2, feature_group_count=3),
            nn.BatchNorm(),
            nn.gelu,
            QuantDepthwise(weights=3, activations=3, levels="pot"),
            qpde.nn.QuantActivation(activations=4, signed=True),
            nn.Dropout(0.5),
            Chain((Halved(), flatten)),
            QuantDense(4, weights=4, activations=4),
        ),
        "no head": (qpde.nn.TVSmoothing(), flatten, nn.Dense(3), nn.tanh, Proven(lambda x: 2 * x, 2.0)),
    }[kind]


@functools.cache
def network(kind):
    model = quantized(Chain(layers_of(kind)), [] if kind == "steps" else [ALL])

    @jax.jit
    def start(key):
        variables = model.init(key, IMAGES)
        keys = iter(jax.random.split(jax.random.fold_in(key, 1), 99))

        def moved(path, leaf):
            name = jax.tree_util.keystr(path)
            noise = jax.random.normal(next(keys), leaf.shape)
            if "scale" in name or "var" in name:
                return jnp.exp(0.4 * noise)
            if "bias" in name or "mean" in name:
                return leaf + 0.1 * noise
            return leaf * 0.3 if "act_clips" in name else leaf

        return jax.tree_util.tree_map_with_path(moved, variables)

    def make(seed):
        return models.converge_norms(model, start(jax.random.key(seed)), IMAGES, bits=Bits(4, 4))

    return model, make


@pytest.mark.parametrize("kind", ["steps", "rules", "no head"])
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 2**31),
    weights=st.integers(2, 8),
    activations=st.sampled_from([2, 3, 4, 8]),
    newton_steps=st.sampled_from([None, 0, 1, 2]),
)
def test_no_input_moves_a_chain_by_more_than_its_bound(kind, seed, weights, activations, newton_steps):
    model, make = network(kind)
    variables, x, bits = make(seed), IMAGES * 0.5, Bits(jnp.int32(weights), jnp.int32(activations))
    found = certify.certify(model, variables, x, bits, newton_steps=newton_steps)
    logits = model.apply(variables, x, bits=bits)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    twin = certify.exact_twin(model, variables, x, bits)
    rounded_twin = model.apply(variables, x, bits=bits.twin)
    np.testing.assert_allclose(rounded_twin, twin, rtol=1e-3, atol=1e-3 * np.abs(twin).max())
    i = found.prediction[:, None]
    pairs = [np.take_along_axis(np.float64(z), i, 1) - z for z in (found.logits, twin)]
    difference, scale = np.abs(pairs[0] - pairs[1]), np.abs(twin).max()
    assert (difference <= found.bound + 1e-9 * scale).all()
    assert (difference <= found.bound_a_priori + 1e-4 * scale).all()  # the run itself is one of float32
    agrees = twin.argmax(-1) == found.prediction
    assert agrees[found.certified].all()
    assert agrees[found.certified_a_priori].all()


def found_constants(link, own, bits, shape, seed):
    """Growth of the twin's part between random points and in its worst direction, and the error of rounding."""
    rounded = jax.jit(link.rounded)(own, bits)
    x, y = (normal(seed + i, 16, *shape) * 3 for i in (1, 2))
    run = jax.jit(link.run)(own, x, bits)

    def norms(x):
        return np.sqrt(np.sum(np.square(x), axis=tuple(range(1, x.ndim))))

    with in_float64():
        rounded, x, y, run = to_float64((rounded, x, y, run))
        twin = jax.jit(lambda x: link.twin(rounded, x))
        growths = [norms(twin(x) - twin(z)) / norms(x - z) for z in (y, x + 1e-2 * y, jnp.full_like(x, 0.1))]
        _, pullback = jax.vjp(twin, x[:1])
        _, forward = jax.vjp(lambda u: pullback(u)[0], twin(x[:1]))  # custom_vjp rules out forward mode
        squared = jax.jit(lambda v: pullback(forward(v)[0])[0])
        direction = y[:1]
        for _ in range(40):
            direction = squared(direction / max(float(norms(direction)[0]), 1e-30))
        growths.append(np.sqrt(norms(direction)))
        return max(growth.max() for growth in growths), norms(run - twin(x)).max()


@pytest.mark.parametrize("kind", ["steps", "rules", "no head"])
def test_the_constants_of_every_part_hold_by_brute_force(kind):
    model, make = network(kind)
    variables, bits = make(3), Bits(jnp.int32(4), jnp.int32(3))
    bounds = step_bounds(model, variables, (8, 8, 3), bits).bounds
    shape, tightest = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), []
    for (link, own, widths), bound in zip(model.links(variables, IMAGES, bits), bounds, strict=True):
        growth, error = found_constants(link, own, widths, shape.shape[1:], 5)
        assert growth <= bound.lipschitz * (1 + 1e-9), link
        assert error <= bound.injected * (1 + 1e-4) + 1e-5, link
        tightest.append(growth / bound.lipschitz)
        shape = jax.eval_shape(functools.partial(link.run, bits=widths), own, shape)
    assert max(tightest) > 0.9  # no bound that holds because it is far away


def test_steps_are_proven_non_expansive_and_enough_bits_certify_everything():
    model, make = network("steps")
    variables = make(0)
    bounds = step_bounds(model, variables, (8, 8, 3), Bits(4, 4))
    assert [round(b.lipschitz, 6) for b in bounds.bounds[2:4]] == [1, 1]
    assert bounds.bounds[4].lipschitz == pytest.approx(1 / 4)  # the mean of 4x4 pixels
    found = certify.certify(model, variables, IMAGES, Bits(4, 15))
    assert found.certified_fraction == 1
    layerwise = Bits(jnp.array([4, 4]), jnp.array([15, 15]))
    own = certify.certify(model, variables, IMAGES, layerwise)
    np.testing.assert_allclose(own.bound, found.bound)
    np.testing.assert_array_equal(
        certify.certify(model, variables, IMAGES, Bits(4, 4), newton_steps=2, steps=bounds).bound,
        certify.certify(model, variables, IMAGES, Bits(4, 4), newton_steps=2).bound,
    )
    with pytest.raises(ValueError, match="constants of another bits"):
        certify.certify(model, variables, IMAGES, Bits(4, 5), steps=bounds)
    with pytest.raises(ValueError, match="one for each of the 2 quantized layers"):
        certify.certify(model, variables, IMAGES, Bits(4, jnp.array([4, 4, 4])))


def test_a_chain_is_its_layers_and_trains_as_a_module():
    model, make = network("rules")
    variables = make(1)
    exact = model.apply(variables, IMAGES, bits=Bits())
    x = IMAGES
    for link, own, _ in model.links(variables, IMAGES, Bits()):
        x = link.run(own, x, Bits())
    np.testing.assert_allclose(exact, x, rtol=1e-4, atol=1e-5)
    _, updates = model.apply(
        variables, IMAGES, train=True, bits=Bits(), mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
    )
    before = variables["batch_stats"]["layers_1"]["mean"]
    assert not np.allclose(updates["batch_stats"]["layers_1"]["mean"], before)
    measure.compare(model, variables, [IMAGES], Bits(4, 4))


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((1, 2)))


REFUSED = {
    "a module that is no chain": (Own(), "Own may do anything between its layers: write it as qpde.nn.Chain"),
    "an own function": (Chain((lambda x: x, flatten)), r"no Lipschitz constant is proven of layers_0 \(<lambda>\)"),
    "an own layer": (Chain((Own(), flatten)), r"layers_0 \(Own\) rounds inside, at layers_0/Dense_0"),
    "borders that are mirrored": (Chain((nn.Conv(2, (3, 3), padding="REFLECT"),)), "its borders are REFLECT"),
    "half precision": (Chain((nn.Dense(2, dtype=jnp.bfloat16),)), "it computes in bfloat16"),
    "smoothing that amplifies": (Chain((qpde.nn.TVSmoothing(models.Smoothing(kind="perona_malik_1")),)), "can amplify"),
    "pixels instead of logits": (Chain((nn.Conv(2, (1, 1)),)), "let it end with logits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_proven_is_refused_with_the_reason(what):
    module, reason = REFUSED[what]
    has_kernel = what not in ("an own function", "smoothing that amplifies")
    model = quantized(module, [ALL] if has_kernel else [])
    variables = model.init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match=reason):
        certify.certify(model, variables, IMAGES, Bits(4, 4))


def test_networks_without_constants_are_refused_with_what_there_is_instead():
    graph = models.create("gcn", num_classes=2)
    with pytest.raises(ValueError, match=r"no Lipschitz constants are proven of GraphNetwork.*measure.compare"):
        certify.certify(graph, {}, IMAGES, Bits(4, 4))
    model = quantized(Own(), [ALL])
    with pytest.raises(ValueError, match=r"of QuantizedModule it is not known which norm.*per_channel=True"):
        unwrap(ptq.equalize)(model, model.init(jax.random.key(0), IMAGES), [IMAGES])
