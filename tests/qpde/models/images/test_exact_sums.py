"""In evaluation, sums of few-bit codes are whole numbers: the same in any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpde import Bits
from qpde.models.images.blocks import BasicBlock, InvertedBlock
from qpde.models.images.call import Call
from qpde.models.layers import Mode


def made(kind=BasicBlock, width=24, size=6, **options):
    """A block with its variables, and an input within its clips."""
    options = {"symmetric": False, "standardize": False} | options
    block = kind(width_in=width, width_out=width, stride=1, **options)
    params, stats = block.init(jax.random.key(0))
    kernels = {
        k: 0.3 * jax.random.normal(jax.random.key(i), v) for i, (k, v) in enumerate(block.kernel_shapes().items())
    }
    norms = {
        n: {"scale": jnp.full(w, 0.31), "bias": jnp.linspace(-0.1, 0.2, w)} for n, w in block.norm_widths().items()
    }
    params = {**params, **kernels, **norms, "act_clips": jnp.full(block.act_count, 2.3)}
    x = jax.random.uniform(jax.random.key(9), (4, size, size, width), maxval=2.5)
    return block, {"params": params, "batch_stats": stats}, x


def run(block, variables, x, bits, mode=None):
    return block(variables, x, 1.0, bits, mode or Mode())[0]


def permuted(variables, order):
    """The same block with its hidden channels in another order: sums over them are taken in that order."""
    params = dict(variables["params"])
    params["kernel1"], params["kernel2"] = params["kernel1"][..., order], params["kernel2"][:, :, order]
    params["norm1"] = jax.tree.map(lambda v: v[order], params["norm1"])
    stats = {**variables["batch_stats"], "norm1": jax.tree.map(lambda v: v[order], variables["batch_stats"]["norm1"])}
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("traced", [False, True])
def test_the_order_of_sums_cannot_change_a_bit(traced):
    block, variables, x = made()
    order = np.random.default_rng(0).permutation(24)
    step = jax.jit(lambda v, bits: run(block, v, x, bits)) if traced else lambda v, bits: run(block, v, x, bits)
    outputs = [step(v, Bits(4, 4)) for v in (variables, permuted(variables, order))]
    np.testing.assert_array_equal(*outputs)
    # With real numbers it does, so this can fail.
    outputs = [step(v, Bits(4, 32)) for v in (variables, permuted(variables, order))]
    assert np.abs(outputs[0] - outputs[1]).max() > 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BasicBlock, {}),
        (BasicBlock, {"symmetric": True}),
        (BasicBlock, {"per_channel": True}),
        (InvertedBlock, {"expansion": 2}),
        (InvertedBlock, {"expansion": 2, "symmetric": True}),
    ],
)
def test_the_function_and_its_gradient_stay_what_they_are(kind, options, monkeypatch):
    block, variables, x = made(kind, width=8, **options)
    f = lambda v, x: run(block, v, x, Bits(4, 4)).sum()  # noqa: E731
    exact, own = run(block, variables, x, Bits(4, 4)), jax.grad(f, (0, 1))(variables, x)
    monkeypatch.setattr(Call, "_note_step", lambda *_, **__: None)
    # A code at a threshold may fall to its other side.
    close = np.abs(exact - run(block, variables, x, Bits(4, 4))) < 1e-5
    assert np.mean(close) > 0.99
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(jax.grad(f, (0, 1))(variables, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max() + 1e-6)


def test_where_a_sum_may_pass_2_to_the_24_numbers_are_real(monkeypatch):
    block, variables, x = made(width=600, size=3)
    params = variables["params"]
    ones = {k: jnp.full_like(params[k], 3.0) for k in ("kernel1", "kernel2")}
    variables = {**variables, "params": params | ones | {"weight_clips": jnp.full(2, 3.0)}}
    codes = run(block, variables, x, Bits(8, 4))  # 127 * 15 * 9 * 600 < 2^24
    wide = run(block, variables, x, Bits(8, 8))
    monkeypatch.setattr(Call, "_note_step", lambda *_, **__: None)
    np.testing.assert_array_equal(wide, run(block, variables, x, Bits(8, 8)))
    np.testing.assert_allclose(codes, run(block, variables, x, Bits(8, 4)), rtol=1e-4, atol=1e-3)


def test_training_sums_real_numbers():
    block, variables, x = made()
    outputs = [
        run(block, v, x, Bits(4, 4), Mode(train=True)) for v in (variables, permuted(variables, np.arange(24)[::-1]))
    ]
    assert np.abs(outputs[0] - outputs[1]).max() > 0
