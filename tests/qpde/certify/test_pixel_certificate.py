"""Certificates per pixel: what is proven never changes, and no bound is passed, of parts and of whole networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpde import Bits, models
from qpde.certify import certify, exact_twin, step_bounds
from qpde.certify.step_bounds import exact_factors, in_float64
from qpde.models.images.blocks import BasicBlock, InvertedBlock, StableBlock
from qpde.models.images.decoders import ConvBlock, PooledBlock, SeparableBlock
from qpde.models.images.network import BoundPart
from qpde.models.images.segmentation import DECODERS, interpolation, resize
from qpde.models.layers import Mode

SYMMETRIC = {"symmetric": True, "stride": 1, "width_out": 2}
BLOCKS = {
    "basic": functools.partial(BasicBlock, symmetric=False, stride=2, width_out=3, dilation_after=2),
    "basic, symmetric": functools.partial(BasicBlock, **SYMMETRIC, dilation=2),
    "basic, expanded": functools.partial(BasicBlock, **SYMMETRIC, expansion=2.5, norm="tied"),
    "stable": functools.partial(StableBlock, symmetric=False, stride=2, width_out=4),
    "inverted": functools.partial(InvertedBlock, symmetric=False, stride=2, width_out=3, expansion=2, dilation=2),
    "inverted, symmetric": functools.partial(InvertedBlock, **SYMMETRIC, expansion=2, padded=True, norm="tied"),
    "convolution": functools.partial(ConvBlock, width_out=3, dilation=2),
    "separable": functools.partial(SeparableBlock, width_out=3, dilation=3),
    "pooled": functools.partial(PooledBlock, width_out=3),
}
BITS = Bits(4, 4)


@functools.cache
def block_and_twin(kind):
    block = BLOCKS[kind](width_in=2, step_size=0.7)

    @jax.jit
    def init(key):
        params, stats = block.init(key)
        return {"params": params, "batch_stats": stats}

    twin = jax.jit(lambda own, x: block(own, x, 0.7, Bits(4, None), Mode(compute_dtype="float64"))[0])
    return block, init, twin, jax.jit(block.spread)


@settings(max_examples=5)
@pytest.mark.parametrize("kind", BLOCKS)
@given(seed=st.integers(0, 2**16), gain=st.floats(0.1, 10), is_local=st.booleans())
def test_no_pixel_of_a_part_changes_by_more_than_its_bounds(kind, seed, gain, is_local):
    block, init, twin, spread = block_and_twin(kind)
    own, rng, size = init(jax.random.key(seed)), np.random.default_rng(seed), (6, 7)
    own["params"]["norm1"]["scale"] = gain * own["params"]["norm1"]["scale"]
    bound = BoundPart(block, own, 0.7, None, BITS)
    lipschitz, _ = block.step_bound(exact_factors(bound), BITS, size)
    norms = block.local_norms(exact_factors(bound))
    x, change = rng.normal(size=(1, *size, 2)), rng.normal(size=(1, *size, 2))
    if is_local:
        change *= rng.random((1, *size, 1)) < 0.1
    with in_float64():
        own = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), own)
        moved = np.linalg.norm(twin(own, jnp.asarray(x)) - twin(own, jnp.asarray(x + change)), axis=-1)
        pixels = spread(norms, jnp.asarray(np.linalg.norm(change, axis=-1, keepdims=True)))[..., 0]
    # Kernels are rounded in float32 by the twin at hand as well.
    assert (moved <= (1 + 1e-5) * np.asarray(pixels) + 1e-12).all()
    assert np.linalg.norm(moved) <= (1 + 1e-5) * lipschitz * np.linalg.norm(change) + 1e-12


def test_interpolation_has_the_weights_that_bounds_use():
    with in_float64():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 3, 1)))
        for size in ((7, 3), (8, 12), (4, 4)):
            rows, columns = interpolation(4, size[0]), interpolation(3, size[1])
            expected = np.einsum("ih,nhwc,jw->nijc", rows, x, columns)
            np.testing.assert_allclose(resize(x, size), expected, atol=1e-12)
            np.testing.assert_allclose(rows.sum(1), 1, atol=1e-12)


@functools.cache
def network(decoder="unet"):
    options = {"norm": "spectral", "residual": "precise", "weight_bits": 4, "act_bits": 8, "decoder_width": 8}
    model = models.create(decoder, encoder="resnet20", num_classes=3, **options)
    model = models.image_network(model.architecture.with_blocks(1, 1, 1), num_classes=3, **vars(model.options))
    return model, jax.jit(model.init)


@settings(max_examples=3)
@given(seed=st.integers(0, 2**16), gain=st.floats(0.3, 3), newton_steps=st.none() | st.integers(0, 6))
def test_proven_pixels_are_the_twins_and_no_bound_is_passed(seed, gain, newton_steps):
    model, init = network()
    x = jax.random.normal(jax.random.key(seed + 1), (1, 32, 35, 3))
    variables = init(jax.random.key(seed), x)
    variables["params"]["head"]["kernel"] = gain * variables["params"]["head"]["kernel"]
    variables = models.converge_norms(model, variables, x)
    bits = Bits(jnp.int32(4), jnp.int32(8))
    found = certify(model, variables, x, bits, newton_steps=newton_steps)
    twin = exact_twin(model, variables, x, bits)
    difference = np.asarray(found.logits, np.float64) - twin
    error = np.abs(np.take_along_axis(difference, found.prediction[..., None], axis=-1) - difference)
    assert (error <= found.bound + 1e-9).all()
    assert (error <= found.bound_a_priori + 1e-5).all()
    assert (found.prediction == twin.argmax(-1))[found.certified].all()
    assert found.shares.shape == (1, len(model.blocks))
    assert (found.state_bound >= 0).all()
    # What is local says that a pixel has not the error of the whole map.
    assert (found.shares.sum(1) <= found.state_bound[:, -1]).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_with_as_many_steps_as_blocks_the_proof_is_the_twin_itself(decoder):
    model, init = network(decoder)
    x = jax.random.normal(jax.random.key(1), (1, 32, 35, 3))
    variables = models.converge_norms(model, init(jax.random.key(0), x), x)
    bits = Bits(jnp.int32(4), jnp.int32(8))
    steps = step_bounds(model, variables, (32, 35), bits)
    # Levels of a U-Net have a symmetric block each, of constant 1; stages begin with a plain one here.
    np.testing.assert_allclose([b.lipschitz for b, k in zip(steps.bounds, model.blocks, strict=True) if k.symmetric], 1)
    twin = exact_twin(model, variables, x, bits)
    for newton_steps in (len(model.blocks), None):
        found = certify(model, variables, x, bits, newton_steps=newton_steps, steps=steps)
        same = found.prediction == twin.argmax(-1)
        np.testing.assert_array_equal(found.certified, same)
        np.testing.assert_allclose(found.estimate, twin, rtol=1e-9, atol=1e-9)
    assert 0 < same.mean() < 1
    assert not found.certified_a_priori.any()
