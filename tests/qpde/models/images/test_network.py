"""Networks that run: how they train, stack, smooth and round, and what they promise about compilation and input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import qpde
from qpde import models
from qpde.models.images.stages import groups
from qpde.models.layers import Mode, moments

IMAGE = (8, 8, 3)


def images(n=2, shape=IMAGE, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, *shape))


def shortened(name="resnet20", **options):
    """The first two stages of a network: every kind of block, at a fraction of the compile time."""
    model = models.create(name, **({"num_classes": 10} | options))
    return model.clone(architecture=model.architecture.with_blocks(*map(len, model.stages[:2])))


@functools.cache
def make(name="resnet20", **options):
    model = shortened(name, **options)
    return model, jax.jit(model.init)(jax.random.key(0), images(1))


@functools.partial(jax.jit, static_argnames=("model", "return_states", "train"))
def apply(model, variables, x, bits=None, return_states=False, train=False):
    return model.apply(variables, x, bits=bits, return_states=return_states, train=train)


@functools.partial(jax.jit, static_argnames=("model", "momentum"))
def train_once(model, variables, x, momentum):
    """Logits, states and what a training step changes but the parameters."""
    run = functools.partial(model.apply, variables, x, train=True, return_states=True, mutable=["batch_stats"])
    (logits, states), updates = run(momentum=momentum)
    return logits, states, updates


@pytest.mark.parametrize("name", ["resnet20", "stablenet20", "mobilenetv2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_kind_of_network_trains_in_low_bits(name, symmetric):
    model, variables = make(name, num_classes=7, symmetric=symmetric, weight_bits=4, act_bits=4)
    x = images(4)

    @jax.jit
    def loss_and_gradient(params, stats):
        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return -jax.nn.log_softmax(logits)[:, 0].mean(), (logits, updates)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (logits, updates)), gradient = loss_and_gradient(variables["params"], variables["batch_stats"])
    assert logits.shape == (4, 7)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, gradient)))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), variables["batch_stats"], updates["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_statistics_of_one_batch_do_not_depend_on_what_was_before():
    broken = {"mean": jnp.full(3, jnp.inf), "var": jnp.full(3, jnp.nan)}
    mean, var, updated = moments(images(2), broken, Mode(train=True, momentum=0.0))
    np.testing.assert_array_equal(updated["mean"], mean)
    np.testing.assert_allclose(updated["var"], var * (128 / 127), rtol=1e-6)


def test_states_are_the_block_outputs_in_order():
    model, variables = make(symmetric=True)
    logits, states = apply(model, variables, images(), return_states=True)
    assert [s.shape for s in states] == [(2, 8, 8, 16)] * 3 + [(2, 4, 4, 32)] * 3
    head = variables["params"]["head"]
    pooled = states[-1].mean((1, 2))
    np.testing.assert_allclose(logits, pooled @ head["kernel"] + head["bias"][None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, apply(model, variables, images()), rtol=1e-5, atol=1e-5)


def test_equal_blocks_of_a_stage_are_stacked():
    model = models.create("resnet56", num_classes=10, symmetric=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), images(1))
    assert variables["params"]["stage1"]["blocks1to8"]["kernel1"].shape == (8, 3, 3, 32, 32)
    assert variables["params"]["stage1"]["block0"]["shortcut_kernel"].shape == (1, 1, 1, 16, 32)
    plain = models.create("resnet20", num_classes=10, symmetric=False)
    assert [g[0] for g in groups(plain.stages[0])] == ["blocks0to2"]


def test_scan_unroll_and_remat_agree():
    x = images(4)

    def run(loop, remat):
        model, variables = make("resnet20", weight_bits=4, act_bits=4, loop=loop, remat=remat)

        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(logits**2), updates

        (value, updates), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        return value, updates, gradient

    # Sums in another order; a rounding tie may flip single codes, hence not float32's full precision.
    unrolled = jax.tree.leaves(run("unroll", False))
    for remat in (False, True):
        for a, b in zip(unrolled, jax.tree.leaves(run("scan", remat)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(a).max() + 1e-6)


def test_changing_traced_bits_never_recompiles():
    model, variables = make(weight_bits=4, act_bits=4)
    compilations = 0

    @jax.jit
    def run(variables, x, bits):
        nonlocal compilations
        compilations += 1
        return model.apply(variables, x, bits=bits)

    outputs = [run(variables, images(), qpde.Bits(w, a)) for w, a in itertools.product((2, 8), (3, 8, 32))]
    assert compilations == 1
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(outputs, 2))
    exactly = jax.jit(lambda v, x: model.apply(v, x, bits=qpde.Bits(8, 3)))(variables, images())
    np.testing.assert_allclose(run(variables, images(), qpde.Bits(8, 3)), exactly, rtol=1e-5, atol=1e-5)


def test_bits_of_the_call_override_those_of_the_model():
    model, variables = make(weight_bits=4, act_bits=4)
    other = shortened(weight_bits=2, act_bits=8)
    as_called = apply(model, variables, images(), bits=qpde.Bits(2, 8))
    np.testing.assert_allclose(as_called, apply(other, variables, images()), rtol=1e-5, atol=1e-5)
    exact = shortened()
    as_called = apply(model, variables, images(), bits=qpde.Bits(None, None))
    np.testing.assert_allclose(as_called, apply(exact, variables, images()), rtol=1e-5, atol=1e-5)


def test_one_value_per_block_equals_the_same_scalar_and_sets_single_blocks():
    model, variables = make(weight_bits=4, act_bits=4)

    def run(bits):
        return apply(model, variables, images(), bits=bits, return_states=True)[1]

    uniform = run(qpde.Bits(4, 4))
    per_block = run(qpde.Bits(jnp.full(6, 4), jnp.full(6, 4)))
    np.testing.assert_allclose(uniform[-1], per_block[-1], rtol=1e-5, atol=1e-5)
    changed = run(qpde.Bits(jnp.full(6, 4), jnp.full(6, 4).at[4].set(2)))
    for i in range(4):
        np.testing.assert_array_equal(changed[i], per_block[i])
    assert bool((changed[4] != per_block[4]).any())


def test_full_precision_has_no_rounding_in_its_program():
    model, variables = make()
    assert "round" not in str(jax.make_jaxpr(model.apply)(variables, images()))


@pytest.mark.parametrize("name", ["resnet20", "stablenet20"])
def test_precise_residual_lets_rounding_enter_by_the_branch_only(name):
    # With h tiny the branch vanishes: the precise net then equals its twin, the rounded net does not.
    def gap(residual):
        model, variables = make(name, weight_bits=4, act_bits=3, residual=residual, step_size=1e-6)
        _, states = apply(model, variables, images(), bits=qpde.Bits(4, 3), return_states=True)
        _, twin = apply(model, variables, images(), bits=qpde.Bits(4, 32), return_states=True)
        return np.abs(states[2] - twin[2]).max()

    if name == "stablenet20":  # all blocks are symmetric; a ResNet's first one is plain and has h = 1
        assert gap("precise") < 1e-3
    assert gap("rounded") > 1e-2


@pytest.mark.parametrize("name", ["resnet20", "stablenet20", "mobilenetv2"])
@pytest.mark.parametrize("norm", ["tied", "spectral"])
def test_steps_with_a_bounded_norm_are_non_expansive(name, norm):
    """x -> x - h K^T D s(D K x + b) never increases a distance, whatever the kernels: the claim of design 2.3."""
    step_size = "auto" if norm == "tied" else 0.1
    model = models.create(name, num_classes=4, norm=norm, step_size=step_size)
    block = next(b for b in model.blocks if b.symmetric)
    params, stats = block.init(jax.random.key(1))
    params["norm1"]["scale"] = 5 * jax.random.normal(jax.random.key(2), params["norm1"]["scale"].shape)
    params["norm1"]["bias"] = 1 + jax.random.normal(jax.random.key(3), params["norm1"]["bias"].shape)
    size = (1, 8, 8, block.width_in)
    variables = {
        "params": params,
        "batch_stats": stats,
        "spectral": block.initial_spectral(jax.random.key(4), params, 8, 8),
    }

    @jax.jit
    def step(x):
        return block(variables, x, 0.1, qpde.Bits(), models.layers.Mode(power_iterations=100))

    # The direction that a step which is too long stretches first is the singular vector.
    worst = step(jnp.zeros(size))[1]["spectral"]["vector"]
    for seed in range(4):
        x, random = (jax.random.normal(jax.random.key(10 * seed + i), size) for i in (0, 1))
        for change in (random, worst, -worst):
            moved = jnp.linalg.norm(step(x + change)[0] - step(x)[0])
            assert float(moved) <= np.linalg.norm(change) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["resnet20", "stablenet20", "mobilenetv2"])
@pytest.mark.parametrize(("norm", "step_size"), [("tied", "auto"), ("spectral", 0.1)])
@pytest.mark.parametrize("bound", [{}, {"lipschitz_target": 0.5}, {"lipschitz_target": 2.0}])
def test_a_step_that_finds_its_own_size_keeps_to_its_bound(name, norm, step_size, bound):
    """h |D K|^2 is the bound, whatever the gain."""
    model = models.create(name, num_classes=4, norm=norm, step_size=step_size, **bound)
    block = next(b for b in model.blocks if b.symmetric)
    params, stats = block.init(jax.random.key(1))
    params["norm1"]["scale"] = 5 * jax.random.normal(jax.random.key(2), params["norm1"]["scale"].shape)
    start = block.initial_spectral(jax.random.key(4), params, 8, 8)
    mode = models.layers.Mode(power_iterations=300)
    at_zero = {"params": params, "batch_stats": stats, "spectral": start}
    carried = jax.jit(lambda x: block(at_zero, x, 0.1, qpde.Bits(), mode)[1]["spectral"])(
        jnp.zeros_like(start["vector"])
    )
    kernels, scales, h = block.factors({**at_zero, "spectral": carried}, 0.1, qpde.Bits())
    linear, adjoint = block.linear_pair(kernels)
    d = models.layers.row(scales["norm1"])
    norm_of_step = qpde.norms.spectral_norm(
        lambda x: d * linear(x),
        start["vector"].shape,
        adjoint=lambda y: adjoint(d * y),
        iterations=300,
        key=jax.random.key(5),
    )
    np.testing.assert_allclose(h * norm_of_step**2, bound.get("lipschitz_target", 1.9), rtol=1e-3)


@pytest.mark.parametrize(("norm", "step_size"), [("tied", "auto"), ("spectral", 0.1)])
@pytest.mark.parametrize("zero", ["kernel", "gain"])
def test_a_step_without_a_kernel_or_gain_stands_still(norm, step_size, zero):
    """No size of step follows from |D K| = 0; it and its gradient stay finite."""
    block = models.create("stablenet20", num_classes=4, norm=norm, step_size=step_size, standardize=False).blocks[0]
    params, stats = block.init(jax.random.key(1))
    start = block.initial_spectral(jax.random.key(4), params, 8, 8)
    if zero == "kernel":
        params["kernel1"] = jnp.zeros_like(params["kernel1"])
    else:
        params["norm1"]["scale"] = jnp.zeros_like(params["norm1"]["scale"])
    x = jax.nn.relu(images(2, (8, 8, block.width_in)))

    @jax.jit
    def step(params):
        variables = {"params": params, "batch_stats": stats, "spectral": start}
        return block(variables, x, 1.0, qpde.Bits(), models.layers.Mode())[0]

    np.testing.assert_array_equal(step(params), x)
    gradient = jax.grad(lambda p: jnp.sum(step(p) ** 2))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_a_scaled_head_sees_pooled_features_of_mean_square_one():
    model, variables = make(head="scaled")
    head = variables["params"]["head"]

    def logits_of(pooled, mean_square):
        return pooled / jnp.sqrt(mean_square) @ head["kernel"] + head["bias"][None]

    logits, states, updates = train_once(model, variables, images(4), momentum=0.0)
    pooled = states[-1].mean((1, 2))
    own = updates["batch_stats"]["head"]["mean_square"]
    np.testing.assert_allclose(own, jnp.mean(pooled**2), rtol=1e-6)
    np.testing.assert_allclose(logits, logits_of(pooled, own), rtol=1e-4, atol=1e-5)
    assert abs(float(own) - 1) > 0.1

    logits, states = apply(model, {**variables, **updates}, images(3, seed=1), return_states=True)
    np.testing.assert_allclose(logits, logits_of(states[-1].mean((1, 2)), own), rtol=1e-4, atol=1e-5)
    *_, updates = train_once(model, variables, images(4), momentum=0.75)
    np.testing.assert_allclose(updates["batch_stats"]["head"]["mean_square"], 0.75 + 0.25 * own, rtol=1e-5)


def test_a_tied_network_with_a_step_of_its_own_has_no_singular_vectors_to_carry():
    model = shortened(norm="tied", step_size=0.1)
    assert "spectral" not in jax.eval_shape(model.init, jax.random.key(0), images(1))


@pytest.mark.parametrize(("norm", "step_size"), [("tied", "auto"), ("spectral", 0.1)])
def test_tied_and_spectral_networks_train_and_carry_their_singular_vectors(norm, step_size):
    model, variables = make(norm=norm, step_size=step_size, weight_bits=4, act_bits=4, residual="precise")
    mutable = [name for name in variables if name != "params"]

    def loss(params):
        logits, updates = model.apply({**variables, "params": params}, images(4), train=True, mutable=mutable)
        return jnp.sum(logits**2), updates

    (_, updates), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    for v in jax.tree.leaves(updates["spectral"]):
        np.testing.assert_allclose(jnp.linalg.norm(v.reshape(v.shape[0], -1), axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="spectral state"):
        model.apply(variables, images(1, (16, 16, 3)))


def test_smoothing_acts_in_the_chosen_blocks_only():
    _, variables = make()

    def states(smoothing):
        return apply(make(smoothing=smoothing)[0], variables, images(), return_states=True)[1]

    plain, one = states(None), states(models.Smoothing(blocks=(4,)))
    for i in range(4):
        np.testing.assert_array_equal(plain[i], one[i])
    assert bool((plain[4] != one[4]).any())
    assert bool((plain[0] != states(models.Smoothing())[0]).any())


def test_smoothing_the_output_lowers_its_total_variation():
    def energy(smoothing):
        model, variables = make(smoothing=smoothing)
        states = apply(model, variables, images(), return_states=True)[1]
        return float(qpde.stencils.total_variation(states[0], eps=0.1).sum())

    assert energy(models.Smoothing(output=True, steps=3)) < energy(models.Smoothing(steps=3))


def test_calibrated_clips_are_those_of_the_data():
    model, variables = make(weight_bits=4, act_bits=8)
    x = images(16)
    calibrated = models.calibrate_clips(model, variables, x, method="absmax", train=True)
    clips = calibrated["params"]["stage0"]["block0"]["act_clips"]
    opening = jax.nn.relu(_normalized(qpde.operators.conv(x, variables["params"]["stem"]["kernel"])))
    np.testing.assert_allclose(clips[0, 0], opening.max(), rtol=1e-4)
    kernel = calibrated["params"]["stage0"]["block0"]["kernel1"][0]
    weight_clip = calibrated["params"]["stage0"]["block0"]["weight_clips"][0, 0]
    np.testing.assert_allclose(weight_clip, jnp.abs((kernel - kernel.mean()) / kernel.std(ddof=1)).max(), rtol=1e-5)
    shapes = jax.tree.map(jnp.shape, variables)
    assert jax.tree.map(jnp.shape, calibrated) == shapes


def _normalized(x):
    return (x - x.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5)


def test_summary_counts_operations_and_bits():
    table = models.summary(models.create("resnet20", num_classes=10, weight_bits=4, act_bits=4), (32, 32, 3))
    assert len(table.rows) == 11
    by_name = {row.name: row for row in table.rows}
    assert by_name["stem"].macs == 32 * 32 * 27 * 16
    assert by_name["stage0.block1"].macs == 2 * 32 * 32 * 9 * 16 * 16
    assert by_name["stage0.block1"].parameters == 9 * 16 * 16 + 4 * 16
    assert by_name["stage1.block0"].output == (16, 16, 32)
    assert by_name["stage1.block0"].macs == 16 * 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    assert by_name["stage1.block0"].bit_operations == 16 * by_name["stage1.block0"].macs
    assert by_name["head"].macs == 640
    assert table.macs == sum(row.macs for row in table.rows) == 40_813_184
    assert "total" in str(table)
    assert by_name["stem"].weight_bytes == 4 * (27 * 16 + 2 * 16)
    assert by_name["stage0.block1"].weight_bytes == 9 * 16 * 16 // 2 + 4 * 4 * 16  # four bits, and two norms in float32
    assert table.weight_bytes == sum(row.weight_bytes for row in table.rows)
    halved = models.summary(
        models.create("resnet20", num_classes=10), (32, 32, 3), bits=qpde.Bits(tuple([4] * 8 + [2]), 4)
    )
    assert halved.weight_bytes < table.weight_bytes
    assert halved.rows[9].bit_operations * 2 == table.rows[9].bit_operations


def test_depthwise_weights_keep_eight_bits_where_anything_is_rounded():
    model = models.create("mobilenetv2", num_classes=3, symmetric=False, standardize=False)
    block = model.blocks[0]
    macs = block.macs(32, 32)

    def of_depthwise(weights):
        row = models.summary(model, (32, 32, 3), bits=qpde.Bits(weights, 4)).rows[1]
        return (row.bit_operations // 4 - weights * (macs["kernel1"] + macs["kernel3"])) / macs["kernel2"]

    assert [of_depthwise(bits) for bits in (4, 16, 32)] == [8, 16, 32]

    params, stats = block.init(jax.random.key(0))
    x = jax.nn.relu(images(1, (8, 8, block.width_in)))

    @jax.jit
    def run(bits):
        return block({"params": params, "batch_stats": stats}, x, 1.0, qpde.Bits(bits, None), models.layers.Mode())[0]

    gaps = {bits: float(jnp.abs(run(jnp.int32(bits)) - run(None)).max()) for bits in (4, 8, 16, 32)}
    assert gaps[4] > gaps[8] > 1e-3
    assert gaps[16] == gaps[32] < 1e-5


def test_bad_input_is_refused_by_name():
    model, variables = make()
    with pytest.raises(ValueError, match=r"too small for resnet20.*2x2"):
        model.apply(variables, images(1, (1, 8, 3)))
    mobile = models.create("mobilenetv2", num_classes=3)
    with pytest.raises(ValueError, match=r"too small for mobilenetv2.*17x17"):
        jax.eval_shape(mobile.init, jax.random.key(0), images(1, (16, 16, 3)))
    jax.eval_shape(mobile.init, jax.random.key(0), images(1, (17, 17, 3)))
    with pytest.raises(ValueError, match=r"\(N, H, W, C\)"):
        model.apply(variables, jnp.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="dtype uint8 must be floating"):
        model.apply(variables, np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="6 blocks"):
        model.apply(variables, images(), bits=qpde.Bits(4, jnp.full(9, 4)))


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2"])
def test_in_bfloat16_every_convolution_and_nothing_else_is_narrow(name):
    model = models.create(name, num_classes=3, norm="spectral", weight_bits=4, act_bits=4, compute_dtype="bfloat16")
    model = model.clone(architecture=model.architecture.with_blocks(len(model.stages[0])))
    x = images(2)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def gradient(variables, x):
        def loss(params):
            (logits, states), updated = model.apply(
                variables | {"params": params}, x, train=True, return_states=True, mutable=["batch_stats", "spectral"]
            )
            return jnp.sum(logits), (states, updated)

        return jax.grad(loss, has_aux=True)(variables["params"])

    program, shapes = jax.make_jaxpr(gradient, return_shape=True)(variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, shapes))} == {jnp.dtype("float32")}
    convolutions = [eqn for eqn in _equations(program.jaxpr) if eqn.primitive.name == "conv_general_dilated"]
    assert len(convolutions) > 10
    assert {v.aval.dtype for eqn in convolutions for v in eqn.invars} == {jnp.dtype("bfloat16")}
    rounding = [eqn for eqn in _equations(program.jaxpr) if eqn.primitive.name in ("round", "rsqrt", "reduce_sum")]
    assert {v.aval.dtype for eqn in rounding for v in eqn.invars} <= {jnp.dtype("float32")}


def _equations(jaxpr):
    """Every equation of a program, those inside loops and functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@pytest.mark.parametrize("options", [{}, {"norm": "tied", "step_size": "auto"}, {"norm": "spectral"}], ids=str)
def test_a_network_works_as_a_module_of_nnx(options):
    model = shortened(**options)
    x = images(2)
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), x)
    logits = bridged(x)
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("options", [{}, {"norm": "spectral"}], ids=str)
def test_every_collection_holds_dictionaries_down_to_its_arrays(options):
    """Tools that walk over variables, of Flax among them, expect what params look like."""
    variables = jax.eval_shape(shortened(**options).init, jax.random.key(0), images(1))
    for name in variables.keys() - {"params"}:
        for stage, holds in variables[name].items():
            if stage.startswith("stage"):
                assert all(isinstance(own, dict) for own in holds.values()), f"{name}/{stage}"
