"""The convolutions of Flax by the operators of qpde: the same values and gradients, for every form of nn.Conv."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpde
from qpde import operators
from qpde.nn.convolutions import conv_general_dilated

# Options of nn.Conv, and whether the operators have that form.
FORMS = [
    ({}, True),
    ({"strides": 2}, True),  # "SAME" pads one side alone
    ({"padding": "VALID"}, True),
    ({"padding": "CIRCULAR"}, True),
    ({"padding": ((2, 0), (1, 1))}, True),
    ({"padding": 2}, True),
    ({"kernel_dilation": 2}, True),
    ({"kernel_size": (5, 3), "strides": (2, 2)}, True),
    ({"kernel_size": (1, 1)}, True),
    ({"feature_group_count": 6}, True),
    ({"feature_group_count": 6, "features": 12}, False),
    ({"feature_group_count": 2}, False),
    ({"kernel_size": (2, 2)}, False),
    ({"strides": (2, 1)}, False),
    ({"input_dilation": 2, "padding": 1}, False),
    ({"kernel_size": (9, 9), "padding": "VALID"}, False),  # larger than the image
    ({"padding": ((-1, 0), (0, 0))}, False),
    ({"precision": "highest"}, False),
    ({"dtype": jnp.bfloat16}, False),
]


@pytest.fixture
def asked(monkeypatch):
    """The operators that are called."""
    found = []

    def noted(name, operator):
        def call(*arguments, **options):
            found.append(name)
            return operator(*arguments, **options)

        return call

    for name in ("conv", "depthwise"):
        monkeypatch.setattr(operators, name, noted(name, getattr(operators, name)))
    return found


@pytest.mark.parametrize(("options", "has_form"), FORMS, ids=str)
def test_values_and_gradients_are_those_of_the_compilers_convolution(asked, options, has_form):
    options = {"features": 6, "kernel_size": (3, 3)} | options
    x = jax.random.normal(jax.random.key(0), (2, 8, 7, 6))
    plain, fast = nn.Conv(**options), nn.Conv(**options, conv_general_dilated=conv_general_dilated)
    variables = plain.init(jax.random.key(1), x)

    def value_and_gradients(model):
        def loss(variables, x):
            return jnp.sin(model.apply(variables, x).astype(jnp.float32)).sum()

        return jax.jit(lambda v, x: (model.apply(v, x), jax.grad(loss, argnums=(0, 1))(v, x)))(variables, x)

    expected = value_and_gradients(plain)
    assert asked == []
    found = value_and_gradients(fast)
    assert bool(asked) == has_form
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_images_without_a_batch_and_other_ranks_work_too(asked):
    images, others = [(8, 7, 3), (2, 2, 8, 7, 3)], [(2, 9, 3), (1, 5, 5, 5, 3)]
    for shape, size in [(shape, (3, 3)) for shape in images] + [(others[0], (3,)), (others[1], (3, 3, 3))]:
        x = jax.random.normal(jax.random.key(0), shape)
        plain, fast = (nn.Conv(4, size, conv_general_dilated=f) for f in (None, conv_general_dilated))
        variables = plain.init(jax.random.key(1), x)
        np.testing.assert_allclose(fast.apply(variables, x), plain.apply(variables, x), rtol=1e-5, atol=1e-5)
    assert asked == ["conv", "conv"]


@pytest.mark.parametrize(
    ("bits", "uses_operators"), [(qpde.Bits(4, 4), True), (qpde.Bits(4, None), True), (qpde.Bits(), False)], ids=str
)
def test_what_rounds_is_convolved_by_operators_and_the_module_itself_is_left_as_it_is(asked, bits, uses_operators):
    model = qpde.quantized(nn.Conv(4, (3, 3)), [qpde.Rule("", weights=4, activations=4)])
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), x)
    asked.clear()
    model.apply(variables, x, bits=bits)
    assert bool(asked) == uses_operators


def test_a_convolution_that_a_module_brings_is_kept():
    def own(*arguments, **options):
        called.append(1)
        return jax.lax.conv_general_dilated(*arguments, **options)

    called = []
    model = qpde.quantized(nn.Conv(4, (3, 3), conv_general_dilated=own), [qpde.Rule("", weights=4, activations=4)])
    model.init(jax.random.key(1), jnp.ones((2, 8, 8, 3)))
    assert called
