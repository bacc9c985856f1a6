"""Programs exported for sizes that are symbols: one program for every batch, and for every height and width."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from qpde import models, operators, quantizers, stencils
from qpde.measure import histograms
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock, InvertedBlock, StableBlock
from qpde.models.options import Smoothing

FULL = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
DEPTHWISE = jax.random.normal(jax.random.key(1), (3, 3, 1, 2))


def squares(f):
    return lambda *arrays: jnp.sum(jnp.square(f(*arrays)))


def with_gradients(f, kernel):
    """f(x, kernel) and both gradients of its squares, as a function of x."""
    return lambda x: (f(x, kernel), *jax.grad(squares(f), (0, 1))(x, kernel))


OPERATORS = {
    "conv": with_gradients(operators.conv, FULL),
    "strided conv": with_gradients(partial(operators.conv, stride=2), FULL),
    "conv_adjoint": with_gradients(operators.conv_adjoint, FULL.swapaxes(2, 3)),
    "depthwise": with_gradients(operators.depthwise, DEPTHWISE),
    "strided depthwise": with_gradients(partial(operators.depthwise, stride=2), DEPTHWISE),
    "depthwise_adjoint": with_gradients(partial(operators.depthwise_adjoint, padding=0), DEPTHWISE),
    "quantizer": with_gradients(lambda x, clip: quantizers.quantize_activation(x, clip, 4), jnp.float32(1.0)),
    "channel quantizer": with_gradients(lambda x, clip: quantizers.quantize_activation(x, clip, 4), jnp.ones(2)),
    "codes": lambda x: quantizers.encode_activation(x, 1.0, 4),
    "histogram": lambda x: histograms.histogram(x, signed=True),
    "energy": lambda x: stencils.total_variation(x, eps=0.1),
    **{
        f"{boundary} smoothing": with_gradients(
            lambda x, gamma2, boundary=boundary: stencils.smooth(x, steps=2, gamma2=gamma2, eps=0.1, boundary=boundary),
            jnp.float32(0.02),
        )
        for boundary in ("neumann", "periodic", "dirichlet")
    },
    **{
        f"{boundary} implicit step": partial(stencils.implicit_step, gamma2=0.1, eps=0.1, boundary=boundary)
        for boundary in ("neumann", "periodic", "dirichlet")
    },
    "divergence": lambda x: stencils.divergence(stencils.gradient(x, boundary="periodic"), boundary="periodic"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_exported_for_every_batch_height_and_width(name):
    f = jax.jit(OPERATORS[name])
    shape = export.symbolic_shape("n, h, w, 2", constraints=["h >= 3", "w >= 3"])
    exported = export.export(f)(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.random.normal(jax.random.key(2), (3, 6, 5, 2))
    for found, expected in zip(jax.tree.leaves(exported.call(x)), jax.tree.leaves(f(x)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected)))


NETWORKS = {
    "resnet20": (registry.Architecture("tiny", BasicBlock, ((4, 8, 2, 2, 1),)), {}),
    "stablenet20": (registry.Architecture("tiny", StableBlock, ((4, 8, 1, 2, 1),)), {"smoothing": Smoothing()}),
    "mobilenetv2": (registry.Architecture("tiny", InvertedBlock, ((4, 4, 2, 1, 2),)), {"norm": "tied"}),
}


@pytest.mark.parametrize("sizes", ["n, 8, 6, 3", "n, h, w, 3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_exported_for_every_batch_height_and_width(name, sizes, monkeypatch):
    architecture, options = NETWORKS[name]
    monkeypatch.setitem(registry.ARCHITECTURES, name, architecture)
    model = models.create(name, num_classes=3, weight_bits=4, act_bits=4, **options)
    x = jax.random.normal(jax.random.key(0), (3, 8, 6, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    apply = jax.jit(model.apply)
    shape = export.symbolic_shape(sizes, constraints=["h >= 4", "w >= 4"] if "h" in sizes else [])
    exported = export.export(apply)(variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(exported.call(variables, x), apply(variables, x), rtol=1e-4, atol=1e-4)


def test_a_training_gradient_is_exported_for_every_batch(monkeypatch):
    monkeypatch.setitem(registry.ARCHITECTURES, "mobilenetv2", NETWORKS["mobilenetv2"][0])
    model = models.create("mobilenetv2", num_classes=3)
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)

    @jax.jit
    def gradient(params, x):
        def loss(params):
            logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[:, 0].mean()

        return jax.grad(loss)(params)

    shape = export.symbolic_shape("n, 6, 6, 3")
    exported = export.export(gradient)(variables["params"], jax.ShapeDtypeStruct(shape, jnp.float32))
    found, expected = exported.call(variables["params"], x), gradient(variables["params"], x)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5 * largest)
