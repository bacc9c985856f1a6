"""`qpde.quantized`: a module that stays itself, layers that are rounded as rules say, and everything that measures."""

from functools import partial
from inspect import unwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

import qpde
from qpde import certify, measure, models, ptq
from qpde.bits import Bits
from qpde.nn import Rule, quantized
from qpde.quantizers import initial_clip, quantize_activation, quantize_weight, standardize_weight

ALL = (Rule("", weights=4, activations=4, signed=True),)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


IMAGES = normal(0, 6, 8, 8, 3)


class CNN(nn.Module):
    """What users bring: norm, dropout, a depthwise convolution inside nn.remat, a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.remat(nn.Conv)(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


CNN_RULES = (
    Rule("stem", weights=4, activations=4, signed=True),
    Rule("head", leave_alone=True),
    Rule("", weights=4, activations=4),
)


@pytest.fixture(scope="module")
def cnn():
    """The module, its own variables, the quantized network and its variables."""
    module = CNN()
    own = jax.jit(module.init)(jax.random.key(1), IMAGES)
    model = quantized(module, CNN_RULES).with_signs(own, [IMAGES])
    return module, own, model, models.calibrate_clips(model, own, IMAGES)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.GroupNorm(2)(x))


SEQUENCE, VOLUME = normal(1, 2, 6, 4), normal(2, 2, 4, 4, 4, 2)
ZOO = {
    "conv": (nn.Conv(5, (3, 3), strides=2), IMAGES),
    "even conv": (nn.Conv(5, (2, 4), padding="VALID"), IMAGES),
    "circular conv": (nn.Conv(5, (3, 3), padding="CIRCULAR", use_bias=False), IMAGES),
    "dilated conv": (nn.Conv(5, (3, 3), kernel_dilation=2), IMAGES),
    "depthwise": (nn.Conv(6, (3, 3), feature_group_count=3), IMAGES),
    "conv in one dimension": (nn.Conv(6, (3,), feature_group_count=2), SEQUENCE),
    "conv in three dimensions": (nn.Conv(5, (3, 3, 3)), VOLUME),
    "local conv": (nn.ConvLocal(5, (3, 3)), IMAGES),
    "transposed": (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), IMAGES),
    "transposed kernel": (nn.ConvTranspose(5, (3, 3), strides=(2, 2), transpose_kernel=True), IMAGES),
    "dense": (nn.Dense(5), SEQUENCE),
    "dense of many axes": (nn.DenseGeneral((3, 5), axis=(-2, -1)), SEQUENCE),
    "einsum": (nn.Einsum((4, 5, 2), "btc,cde->btde"), SEQUENCE),
    "attention": (Attention(), SEQUENCE),
}


def without_clips(tree):
    return {k: without_clips(v) if isinstance(v, dict) else v for k, v in tree.items() if not k.endswith("clips")}


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), a, b))


# --- The module itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_without_bits_it_is_the_module_itself_from_the_same_start(name):
    module, x = ZOO[name]
    model = quantized(module, ALL)
    own, variables = (jax.jit(m.init)(jax.random.key(3), x) for m in (module, model))
    # Two compiled programs may differ in the last digits of the random numbers: of numbers near 1, so absolutely.
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, without_clips(variables["params"]), own["params"])
    expected = module.apply(own, x)
    np.testing.assert_array_equal(model.apply(own, x, bits=Bits()), expected)
    np.testing.assert_array_equal(
        model.apply(variables, x, bits=Bits()), module.apply({"params": without_clips(variables["params"])}, x)
    )
    at_four = model.apply(variables, x)
    assert not np.allclose(at_four, expected)
    np.testing.assert_allclose(model.apply(variables, x, bits=Bits(32, 32)), expected, rtol=1e-4, atol=1e-5)


SINGLE = [name for name in ZOO if name != "attention"]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_layer_is_the_same_layer_of_the_rounded_kernel_and_input(name, per_channel):
    module, x = ZOO[name]
    model = quantized(module, [Rule("", signed=True, per_channel=per_channel)])
    variables = model.adopt(module.init(jax.random.key(3), x), x)
    params = dict(variables["params"])
    outputs = {"transposed kernel": (-2,), "dense of many axes": (-2, -1), "einsum": (-2, -1)}.get(name, (-1,))
    kernel = np.asarray(params["kernel"])
    clip = np.abs(kernel)
    if per_channel:  # one for each of the output's channels
        clip = clip.max(tuple(i for i in range(kernel.ndim) if i - kernel.ndim not in outputs), keepdims=True)
        assert params["weight_clips"].size == clip.size > 1
        np.testing.assert_array_equal(params["weight_clips"], clip.ravel())
    else:
        np.testing.assert_array_equal(params["weight_clips"], clip.max())
    # By the formula of the quantizer: three bits are -3 .. 3 of a third of the clip.
    clip = np.broadcast_to(clip if per_channel else clip.max(), kernel.shape)
    rounded = np.round(kernel / clip * np.float32(3)) / np.float32(3) * clip
    assert params["act_clips"] == 6
    xq = quantize_activation(x, 6.0, 5, signed=True)
    expected = module.apply(
        {"params": {"bias": params["bias"]} if module.use_bias else {}}
        | {"params": {k: v for k, v in params.items() if k == "bias"} | {"kernel": jnp.asarray(rounded)}},
        xq,
    )
    np.testing.assert_allclose(model.apply(variables, x, bits=Bits(3, 5)), expected, rtol=1e-4, atol=1e-5)


def test_levels_standardization_and_unsigned_inputs_follow_the_rule():
    x = normal(4, 5, 4)
    rule = Rule("", weights=3, activations=3, levels="apot", standardize=True, signed=False)
    module, model = nn.Dense(3, use_bias=False), quantized(nn.Dense(3, use_bias=False), [rule])
    variables = model.init(jax.random.key(0), x)
    kernel = quantize_weight(standardize_weight(variables["params"]["kernel"]), 3.0, 3, levels="apot")
    xq = quantize_activation(x, 6.0, 3, levels="apot")
    np.testing.assert_allclose(model.apply(variables, x), xq @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.apply(variables, x, bits=Bits()), module.apply(variables, x))


def test_smoothing_comes_before_the_quantizer_and_belongs_to_it():
    smoothing = models.Smoothing(steps=2, gamma2=0.02, learned=True)
    module = nn.Conv(4, (1, 1), use_bias=False)
    model = quantized(module, [Rule("", signed=True, smoothing=smoothing)])
    variables = model.init(jax.random.key(0), IMAGES)
    np.testing.assert_allclose(variables["params"]["gamma2_share"], 0.8)
    smooth = qpde.stencils.smooth(IMAGES, steps=2, gamma2=0.02, eps=0.1)
    expected = module.apply(variables, quantize_activation(smooth, 6.0, 4, signed=True))
    np.testing.assert_allclose(model.apply(variables, IMAGES, bits=Bits(None, 4)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.apply(variables, IMAGES, bits=Bits()), module.apply(variables, IMAGES))
    with pytest.raises(ValueError, match=r"smoothing is for maps .* takes \(2, 6, 4\)"):
        quantized(nn.Dense(3), [Rule("", smoothing=smoothing)]).init(jax.random.key(0), SEQUENCE)


def test_training_mode_is_passed_on_and_random_numbers_are_the_modules_own(cnn):
    module, own, model, variables = cnn
    options = {"train": True, "rngs": {"dropout": jax.random.key(5)}, "mutable": ["batch_stats"]}
    expected, statistics = module.apply(own, IMAGES, **options)
    found, updates = model.apply(variables, IMAGES, bits=Bits(), **options)
    np.testing.assert_array_equal(found, expected)
    assert equal(updates, statistics)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        return nn.Dropout(0.5)(nn.Dense(2)(x), deterministic=deterministic)


def test_train_is_passed_on_by_the_name_that_the_module_has_for_it():
    model = quantized(Deterministic(), ALL)
    variables = model.init(jax.random.key(0), SEQUENCE, train=False)
    quiet = model.apply(variables, SEQUENCE, train=False)
    loud = model.apply(variables, SEQUENCE, train=True, rngs={"dropout": jax.random.key(0)})
    assert jnp.all((loud == 0) | jnp.isclose(loud, 2 * quiet))
    np.testing.assert_array_equal(model.apply(variables, SEQUENCE, deterministic=True), quiet)


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_the_first_matching_rule_decides(cnn):
    module, own, _, _ = cnn
    rules = [Rule("stem", weights=8, activations=8), Rule("head", leave_alone=True), Rule(".", weights=2)]
    model = quantized(module, rules)
    assert model.bits is None  # they differ
    assert model.block_names(own, IMAGES) == ["stem", "depthwise"]
    own_bits = model.layer_bits(own, IMAGES)
    assert own_bits.weights.tolist() == [8, 2]
    assert own_bits.activations.tolist() == [8, 32]
    variables = model.adopt(own, IMAGES)
    one_by_one = Bits(own_bits.weights, jnp.array([8, 32]))
    np.testing.assert_allclose(
        model.apply(variables, IMAGES), model.apply(variables, IMAGES, bits=one_by_one), rtol=1e-4, atol=1e-5
    )
    assert model.with_bits(Bits(3, 3)).bits == Bits(3, 3)


def test_a_rule_that_decides_nothing_is_an_error_that_lists_the_paths(cnn):
    module, own, _, _ = cnn
    with pytest.raises(ValueError, match="'Conv_7' matches no layer; this network has: stem, depthwise, head"):
        quantized(module, [Rule("Conv_7")]).init(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="'head' decides nothing, since rules before it match its layers"):
        quantized(module, [Rule(""), Rule("head")]).apply(own, IMAGES, bits=Bits())


def test_bad_rules_and_modules_are_refused_by_name():
    for options, message in (
        ({"weights": 1}, r"weights \(=1\)"),
        ({"activations": 33}, r"activations \(=33\)"),
        ({"levels": "log"}, "'log'"),
        ({"signed": "maybe"}, "'maybe'"),
        ({"smoothing": models.Smoothing(output=True)}, "neither `blocks` nor `output`"),
    ):
        with pytest.raises(ValueError, match=message):
            Rule("", **options)
    with pytest.raises(ValueError, match="no regular expression"):
        Rule("(")
    with pytest.raises(ValueError, match="has quantizers already"):
        quantized(models.create("resnet20", num_classes=10))
    with pytest.raises(ValueError, match=r"no flax\.linen\.Module"):
        unwrap(quantized)(jnp.tanh)
    with pytest.raises(ValueError, match=r"must be qpde\.Rule"):
        unwrap(quantized)(nn.Dense(1), ["Dense"])


# --- Bits, states, transforms -----------------------------------------------------------------------------------------


def test_one_program_serves_all_bits(cnn):
    _, _, model, variables = cnn
    traced = []

    @jax.jit
    def logits(bits):
        traced.append(bits)
        return model.apply(variables, IMAGES, bits=bits)

    for width in (2, 3, 8):
        np.testing.assert_allclose(
            logits(Bits(jnp.int32(width), jnp.int32(width))),
            model.apply(variables, IMAGES, bits=Bits(width, width)),
            rtol=1e-4,
            atol=1e-5,
        )
    assert len(traced) == 1


def test_bits_of_another_number_than_layers_are_refused(cnn):
    _, _, model, variables = cnn
    with pytest.raises(ValueError, match=r"bits.weights has shape \(3,\).* each of the 2 quantized layers"):
        model.apply(variables, IMAGES, bits=Bits(jnp.array([2, 2, 2]), 4))


def test_states_are_the_outputs_of_the_quantized_layers_in_order(cnn):
    _, _, model, variables = cnn
    logits, states = model.apply(variables, IMAGES, return_states=True)
    np.testing.assert_array_equal(logits, model.apply(variables, IMAGES))
    _, captured = model.apply(variables, IMAGES, capture_intermediates=True, mutable=["intermediates"])
    seen = captured["intermediates"]
    np.testing.assert_allclose(states[0], seen["stem"]["__call__"][0], rtol=1e-6)
    np.testing.assert_allclose(states[1], seen["depthwise"]["__call__"][0], rtol=1e-6)
    assert len(states) == 2


class Shared(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)

    def __call__(self, x):
        return self.dense(10 * nn.relu(self.dense(x)))


def test_a_layer_that_is_called_twice_has_one_kernel_and_a_clip_for_each_input():
    model = quantized(Shared(), [Rule("", signed=True)])
    variables = models.calibrate_clips(
        model, Shared().init(jax.random.key(0), SEQUENCE), SEQUENCE, method="absmax", bits=Bits(4, 4)
    )
    own = variables["params"]["dense"]
    assert sorted(own) == ["act2_clips", "act_clips", "bias", "kernel", "weight_clips"]
    np.testing.assert_allclose(own["act_clips"], jnp.abs(SEQUENCE).max())
    assert own["act2_clips"] > 2 * own["act_clips"]
    _, states = model.apply(variables, SEQUENCE, bits=Bits(4, 4), return_states=True)
    assert len(states) == 2
    assert model.layers(variables, SEQUENCE)["dense"].macs == 2 * SEQUENCE.size * 4


class Derived(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) * 2


def test_a_layer_that_is_derived_from_another_is_rounded_once():
    model, plain = (quantized(kind(3), ALL) for kind in (Derived, nn.Dense))
    variables = model.init(jax.random.key(0), SEQUENCE)
    np.testing.assert_allclose(model.apply(variables, SEQUENCE), 2 * plain.apply(variables, SEQUENCE), rtol=1e-6)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x - 0.3 * nn.Dense(4, name="dense")(nn.relu(x)), None


class Scanned(nn.Module):
    axes: tuple[str, ...] = ("params", "states", "observed")
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        step = nn.remat(Step) if self.remat else Step
        variable_axes = dict.fromkeys(self.axes, 0)
        x, _ = nn.scan(step, variable_axes, split_rngs={"params": True}, length=3)(name="steps")(x, None)
        return nn.Dense(2, name="head")(x)


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Step(name=f"step{i}")(x, None)
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_inside_scan_and_remat_are_those_of_the_unrolled_module(remat):
    model, unrolled = quantized(Scanned(remat=remat), ALL), quantized(Unrolled(), ALL)
    own = model.init(jax.random.key(0), SEQUENCE)

    def unstacked(tree):
        stacked = tree["params"]["steps"]
        steps = {f"step{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)}
        return {"params": {**steps, "head": tree["params"]["head"]}}

    calibrated = models.calibrate_clips(model, own, SEQUENCE)
    expected = models.calibrate_clips(unrolled, unstacked(own), SEQUENCE)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), unstacked(calibrated), expected)
    logits, states = model.apply(calibrated, SEQUENCE, return_states=True)
    logits_u, states_u = unrolled.apply(expected, SEQUENCE, return_states=True)
    np.testing.assert_allclose(logits, logits_u, rtol=1e-5, atol=1e-6)
    assert len(states) == len(states_u) == 4
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), states, states_u)
    assert [row.macs for row in model.summary(SEQUENCE.shape[1:]).rows] == [3 * 6 * 16, 6 * 8]
    found = measure.distributions(model, calibrated, [SEQUENCE], Bits(4, 4))
    expected = measure.distributions(unrolled, expected, [SEQUENCE], Bits(4, 4))
    np.testing.assert_allclose([d.kurtosis for d in found], [d.kurtosis for d in expected], rtol=1e-4)
    loss = lambda v, m: m.apply(v, SEQUENCE).sum()  # noqa: E731
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        unstacked(jax.grad(loss)(calibrated, model)),
        jax.grad(loss)(unstacked(calibrated), unrolled),
    )


class SharedByVmap(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": None, "states": 0, "observed": 0}
        return nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": False})(3, name="dense")(x)


def test_a_layer_that_vmap_runs_with_shared_parameters_has_the_largest_clip_of_all():
    model = quantized(SharedByVmap(), ALL)
    variables = models.calibrate_clips(model, model.init(jax.random.key(0), SEQUENCE), SEQUENCE, method="absmax")
    assert variables["params"]["dense"]["act_clips"] == jnp.abs(SEQUENCE).max()
    assert model.apply(variables, SEQUENCE).shape == (2, 6, 3)


def test_a_scan_that_does_not_carry_the_states_is_refused_with_the_way_out():
    model = quantized(Scanned(axes=("params",)), ALL)
    variables = model.init(jax.random.key(0), SEQUENCE)
    assert model.apply(variables, SEQUENCE).shape == (2, 6, 2)
    with pytest.raises(ValueError, match=r"'steps/dense'.*variable_axes=.*\"states\": 0"):
        model.apply(variables, SEQUENCE, return_states=True)
    with pytest.raises(ValueError, match=r"\"observed\": 0"):
        models.calibrate_clips(model, variables, SEQUENCE)


def test_vmap_and_shard_map_run_it_as_it_is(cnn):
    _, _, model, variables = cnn
    expected = model.apply(variables, IMAGES)
    mapped = jax.vmap(lambda x: model.apply(variables, x[None])[0])(IMAGES)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    apply = jax.jit(jax.shard_map(model.apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
    np.testing.assert_allclose(apply(variables, IMAGES), expected, rtol=1e-5, atol=1e-6)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(quantized(nn.Dense(4), ALL)(x))


def test_a_sequential_module_has_the_paths_of_its_parameters():
    module = nn.Sequential([nn.Dense(4), nn.relu, nn.Sequential([nn.Dense(3)])])
    model = quantized(module, [Rule("^layers_0$", weights=4, activations=4, signed=True)])
    variables = model.init(jax.random.key(0), SEQUENCE)
    assert list(model.layers(variables, SEQUENCE)) == ["layers_0", "layers_2/layers_0"]
    assert [row.name for row in models.summary(model, (6, 4)).rows] == ["layers_0", "layers_2/layers_0"]
    assert len(measure.distributions(model, variables, [SEQUENCE], Bits(4, 4))) == 1


def test_it_is_a_module_inside_another_one():
    variables = Outer().init(jax.random.key(0), SEQUENCE)
    params = variables["params"]  # as they would be without the wrapper
    assert set(params["Dense_0"]) == {"kernel", "bias"}
    assert set(params["Dense_1"]) == {"kernel", "bias", "weight_clips", "act_clips"}
    inner = quantized(nn.Dense(4), ALL).apply({"params": params["Dense_1"]}, SEQUENCE)
    expected = nn.Dense(2).apply({"params": params["Dense_0"]}, inner)
    np.testing.assert_allclose(Outer().apply(variables, SEQUENCE), expected)


def test_nnx_trains_it_through_the_bridge():
    """What works: `ToNNX` of the quantized module, its parameters and clips as nnx.Param, gradients by nnx."""
    model = nnx.bridge.ToNNX(quantized(nn.Dense(3), ALL), rngs=nnx.Rngs(0)).lazy_init(SEQUENCE)
    loss = lambda m: (m(SEQUENCE) ** 2).sum()  # noqa: E731
    before, grads = nnx.value_and_grad(loss)(model)
    named = {path[-1]: value for path, value in nnx.to_flat_state(grads)}
    assert set(named) == {"kernel", "bias", "weight_clips", "act_clips"}
    nnx.update(model, jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(model, nnx.Param), grads))
    assert loss(model) < before
    exact = model(SEQUENCE, bits=Bits())
    kernel, bias = model.kernel[...], model.bias[...]
    np.testing.assert_allclose(exact, SEQUENCE @ kernel + bias[None, None], rtol=1e-5)


class OfLists(nn.Module):
    features: list[int]

    @nn.compact
    def __call__(self, x):
        for features in self.features:
            x = nn.Dense(features)(x)
        return x


def test_frozen_variables_and_modules_with_lists_are_taken():
    model = quantized(OfLists([4, 3]), [Rule("", weights=4, activations=4)])
    own = OfLists([4, 3]).init(jax.random.key(0), SEQUENCE)
    model = model.with_signs(freeze(own), [SEQUENCE])
    variables = models.calibrate_clips(model, own, SEQUENCE)
    assert jax.tree.structure(model.adopt(freeze(own), SEQUENCE)) == jax.tree.structure(variables)
    np.testing.assert_array_equal(model.apply(freeze(variables), SEQUENCE), model.apply(variables, SEQUENCE))
    assert model.block_names(freeze(variables), SEQUENCE) == ["Dense_0", "Dense_1"]
    assert measure.compare(model, variables, [SEQUENCE[:, 0]], Bits(4, 4)).layer_error.shape == (2,)
    assert len(measure.distributions(model, variables, [SEQUENCE], Bits(4, 4))) == 2
    assert hash(model) == hash(model.clone())
    assert model != quantized(OfLists([4, 4]), model.rules)


def test_it_is_exported_as_it_is(cnn):
    _, _, model, variables = cnn
    exported = jax.export.export(jax.jit(lambda x: model.apply(variables, x)))(IMAGES)
    np.testing.assert_allclose(exported.call(IMAGES), model.apply(variables, IMAGES), rtol=1e-5, atol=1e-6)


# --- Clips ------------------------------------------------------------------------------------------------------------


def test_an_own_checkpoint_loads_and_lacks_only_clips(cnn):
    _, own, model, variables = cnn
    with pytest.raises(ValueError, match=r"stem has no '\w+_clips'.*calibrate_clips.*adopt"):
        model.apply(own, IMAGES)
    assert equal(without_clips(variables["params"]), own["params"])
    assert not any("clips" in name for name in variables["params"]["head"])
    kernel = own["params"]["stem"]["kernel"]
    clips = variables["params"]["stem"]
    np.testing.assert_allclose(clips["weight_clips"], initial_clip(kernel, 4, signed=True, method="mse"), rtol=1e-5)
    np.testing.assert_allclose(clips["act_clips"], initial_clip(IMAGES, 4, signed=True, method="mse"), rtol=1e-5)
    adopted = model.adopt(own, IMAGES)
    assert jax.tree.structure(adopted) == jax.tree.structure(variables)


def test_signs_that_are_open_are_decided_by_data(cnn):
    module, own, model, _ = cnn
    assert dict(model.signs) == {"depthwise": False}  # the stem's rule says it
    with pytest.raises(ValueError, match=r"'depthwise' can be negative is open.*with_signs"):
        models.calibrate_clips(quantized(module, CNN_RULES), own, IMAGES)
    with pytest.raises(ValueError, match="`batches` is empty"):
        quantized(module, CNN_RULES).with_signs(own, [])


# --- What measures networks takes it ----------------------------------------------------------------------------------


def test_it_follows_the_protocol_as_our_networks_do(cnn):
    for network in (cnn[2], models.create("resnet20", num_classes=2), models.gcn(num_classes=2)):
        assert isinstance(network, qpde.QuantizedNetwork)
    assert not isinstance(CNN(), qpde.QuantizedNetwork)


def test_statistics_are_those_of_the_batch_alone_at_momentum_zero(cnn):
    _, _, model, variables = cnn
    found = measure.reestimate_statistics(model, variables, [IMAGES], Bits(4, 4))["batch_stats"]["BatchNorm_0"]
    _, states = model.apply(variables, IMAGES, bits=Bits(4, 4), return_states=True)
    np.testing.assert_allclose(found["mean"], states[0].mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], states[0].var((0, 1, 2)), rtol=1e-4)


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "centre", jnp.zeros, ())
        if train and self.is_mutable_collection("batch_stats"):
            mean.value = 0.9 * mean.value + 0.1 * x.mean()
        return nn.Dense(2)(x - mean.value)


def test_statistics_of_an_unknown_norm_are_refused():
    model = quantized(OwnNorm(), ALL)
    variables = model.init(jax.random.key(0), SEQUENCE)
    with pytest.raises(ValueError, match=r"batch_stats/centre belongs to no nn\.BatchNorm"):
        measure.reestimate_statistics(model, variables, [SEQUENCE], Bits(4, 4))


def test_compare_and_any_bits_measure_what_calls_of_the_network_give(cnn):
    _, _, model, variables = cnn
    labels = np.arange(6) % 5
    found = measure.compare(model, variables, [(IMAGES, labels)], Bits(3, 3), statistics_batches=[IMAGES])
    assert found.layer_error.shape == (2,)
    bits = (Bits(3, 32), Bits(3, 3))
    (_, exact), (_, rounded) = (
        model.apply(measure.reestimate_statistics(model, variables, [IMAGES], b), IMAGES, bits=b, return_states=True)
        for b in bits
    )
    errors = [np.sqrt(np.mean(np.square(a - b))) for a, b in zip(exact, rounded, strict=True)]
    np.testing.assert_allclose(found.layer_error, errors, rtol=1e-4)
    several = measure.compare_bits(model, variables, [(IMAGES, labels)], [Bits(2, 2), Bits(8, 8)])
    alone = measure.compare(model, variables, [(IMAGES, labels)], Bits(8, 8))
    np.testing.assert_allclose(several.logit_error[1], alone.logit_error, rtol=1e-3)
    assert several.logit_error[1] < several.logit_error[0]


def test_sensitivities_costs_and_an_allocation_are_layer_by_layer(cnn):
    _, _, model, variables = cnn
    choices = [Bits(2, 2), Bits(8, 8)]
    errors = ptq.sensitivity(model, variables, iter([IMAGES]), choices).kl
    costs = ptq.block_costs(model, (8, 8, 3), choices)
    assert costs.tolist() == [[64 * 9 * 3 * 8 * 4, 64 * 9 * 8 * 4], [64 * 9 * 3 * 8 * 64, 64 * 9 * 8 * 64]]
    assert errors.shape == (2, 2)
    assert (errors[0] > errors[1]).all()
    chosen = ptq.allocate(errors, costs, int(costs[0].sum() + costs[1, 1] - costs[0, 1]))
    bits = ptq.block_bits([choices[c] for c in chosen])
    assert model.apply(variables, IMAGES, bits=bits).shape == (6, 5)


def test_distributions_are_those_of_the_layers_inputs(cnn):
    _, _, model, variables = cnn
    found = measure.distributions(model, variables, [IMAGES[:3], IMAGES[3:]], Bits(4, 4))
    assert [(d.block, d.index, d.signed) for d in found] == [(0, 0, True), (1, 0, False)]
    np.testing.assert_allclose([found[0].mean, found[0].std], [IMAGES.mean(), IMAGES.std()], rtol=1e-4)
    assert found[0].clip == variables["params"]["stem"]["act_clips"]
    assert found[0].used_levels <= 15


def test_calibration_reads_clips_off_all_batches_each_at_its_layers_bits(cnn):
    module, own, _, _ = cnn
    batches = [IMAGES[:3], IMAGES[3:]]
    rules = [Rule("stem", weights=4, activations=8, signed=True), Rule("", weights=4, activations=3, signed=False)]
    model = quantized(module, rules)
    assert model.bits is None
    found = qpde.calibrate(model, own, batches, activations="absmax")["params"]
    np.testing.assert_allclose(found["stem"]["act_clips"], jnp.abs(IMAGES).max(), rtol=0.02)
    together = qpde.calibrate(model, own, [IMAGES], activations="mse")["params"]
    apart = qpde.calibrate(model, own, batches, activations="mse")["params"]
    wide = qpde.calibrate(model, own, batches, activations="mse", bits=Bits(4, 8))["params"]
    for name in ("stem", "depthwise", "head"):
        np.testing.assert_allclose(apart[name]["act_clips"], together[name]["act_clips"], rtol=0.02)
    np.testing.assert_array_equal(wide["stem"]["act_clips"], apart["stem"]["act_clips"])
    assert wide["head"]["act_clips"] > apart["head"]["act_clips"]
    kernel = own["params"]["head"]["kernel"]
    np.testing.assert_allclose(
        apart["head"]["weight_clips"], initial_clip(kernel, 4, signed=True, method="mse"), rtol=1e-5
    )
    with pytest.raises(ValueError, match="`batches` is empty"):
        qpde.calibrate(model, own, [])


def test_post_training_quantization_chooses_clips_and_corrects_the_last_bias(cnn):
    module, own, _, _ = cnn
    batches = [IMAGES[:3], IMAGES[3:]]
    model, variables = ptq.quantize(quantized(module, [Rule("")]), own, batches, Bits(4, 4), per_channel=True)
    assert model.bits == Bits(4, 4)
    assert dict(model.signs) == {"stem": True, "depthwise": False, "head": False}
    assert variables["params"]["stem"]["weight_clips"].shape == (8,)
    exact, rounded = module.apply(own, IMAGES), model.apply(variables, IMAGES)
    np.testing.assert_allclose(rounded.mean(0), exact.mean(0), atol=1e-4)
    assert model.output_bias(variables, IMAGES) == ("head", "bias")
    plain, uncorrected = ptq.quantize(quantized(module, [Rule("")]), own, batches, Bits(4, 4), bias_correction=False)
    assert jnp.abs(plain.apply(uncorrected, IMAGES).mean(0) - exact.mean(0)).max() > 1e-3


def test_a_summary_counts_every_layer_and_all_parameters(cnn):
    _, own, model, _ = cnn
    summary = models.summary(model, (8, 8, 3), bits=Bits(4, 8))
    assert summary.parameters == sum(leaf.size for leaf in jax.tree.leaves(own["params"]))
    rows = {row.name: row for row in summary.rows}
    assert rows["depthwise"].macs == 64 * 9 * 8
    assert rows["depthwise"].bit_operations == 64 * 9 * 8 * 32
    assert rows["depthwise"].weight_bytes == 72 * 4 // 8 + 4 * 8
    assert (rows["head"].weight_bits, rows["head"].macs) == (32, 40)
    assert "other parameters" in str(summary)


def test_layers_whose_outputs_are_not_one_for_each_input_are_named():
    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (x + nn.Dense(4)(jnp.ones((1, 6, 4)))[:1]).mean(1)

    model = quantized(Positions(), ALL)
    variables = model.init(jax.random.key(0), SEQUENCE)
    with pytest.raises(ValueError, match=r"the output of block 0 has shape \(1, 6, 4\), not 2 first"):
        measure.compare(model, variables, [SEQUENCE], Bits(4, 4))
    with pytest.raises(ValueError, match="no block"):
        measure.compare(quantized(Positions()), variables, [SEQUENCE], Bits(4, 4))


@pytest.mark.parametrize("name", [name for name in SINGLE if name != "local conv"])
def test_multiply_accumulates_are_those_that_the_compiler_counts(name):
    module, x = ZOO[name]
    model = quantized(module, ALL)
    variables = model.init(jax.random.key(0), x)
    (layer,) = model.layers(variables, x).values()
    bias = layer.output_shape and np.prod(layer.output_shape) if module.use_bias else 0
    flops = jax.jit(module.apply).lower(variables, x).compile().cost_analysis()["flops"]
    # The compiler leaves out products with the zeros of a border, or spread between the pixels of a transposed layer.
    assert (flops - bias) / 2 <= layer.macs * 1.01
    if name in ("dense", "dense of many axes", "einsum", "even conv"):
        np.testing.assert_allclose((flops - bias) / 2, layer.macs, rtol=0.01)


def test_what_needs_more_than_the_protocol_is_refused_with_the_reason(cnn):
    _, own, model, variables = cnn
    with pytest.raises(ValueError, match=r"CNN may do anything between its layers: write it as qpde\.nn\.Chain"):
        unwrap(certify.certify)(model, variables, IMAGES, Bits(4, 8))
    with pytest.raises(ValueError, match="known which norm stands behind which kernel: equalize image networks"):
        ptq.equalize(model, variables, [IMAGES])
    del own


def test_layers_of_qpde_inside_it_keep_their_own_settings_and_take_the_calls_bits():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = qpde.nn.QuantConv(4, weights=4, activations=4)(x)
            x = qpde.nn.SymmetricStep(steps=2, weights=4, activations=4)(x, train=train)
            return qpde.nn.QuantDense(3)(x.mean((1, 2)))

    model = quantized(Net())
    variables = model.init(jax.random.key(0), IMAGES)
    variables = models.calibrate_clips(model, variables, IMAGES, train=True, bits=Bits(4, 4))
    assert sorted(variables) == ["batch_stats", "params", "spectral"]
    variables = measure.reestimate_statistics(model, variables, [IMAGES], Bits(4, 4))
    variables = models.converge_norms(model, variables, IMAGES, bits=Bits(4, 4))
    names = ["QuantConv_0", "SymmetricStep_0", "QuantDense_0"]
    assert model.block_names(variables, IMAGES) == names
    np.testing.assert_array_equal(
        model.apply(variables, IMAGES), Net().apply(variables, IMAGES), err_msg="its own bits where a call gives none"
    )
    assert measure.compare(model, variables, [IMAGES], Bits(4, 4)).layer_error.shape == (3,)
    found = measure.distributions(model, variables, [IMAGES], Bits(4, 4))
    assert [(d.block, d.index) for d in found] == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    rows = {row.name: row for row in models.summary(model, (8, 8, 3), bits=Bits(4, 4)).rows}
    assert rows["SymmetricStep_0"].macs == 2 * 2 * 64 * 9 * 16
    flat = flatten_dict(variables["params"])
    assert rows["SymmetricStep_0"].parameters == sum(
        leaf.size for place, leaf in flat.items() if place[0] == "SymmetricStep_0" and "clips" not in place[-1]
    )
