"""Parity with the published networks: every block, logits, loss, gradients and batch statistics (golden files).

Their first stages are in the repository; the networks as a whole lie beside the real data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpde
from qpde import models
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
from qpde.models.images.torch_weights import tree_from_torch

FULL_PRECISION = ["resnet20_fp32", "stablenet20_fp32"]
QUANTIZED = ["resnet20_stable_w4a4", "stablenet20_w4a4"]
NETS = FULL_PRECISION + QUANTIZED


@pytest.fixture(scope="module")
def net(request, golden_dir):
    golden = dict(np.load(golden_dir / f"{request.param}.npz"))
    model, variables = load(golden, state_of(golden))
    return request.param, golden, model, variables, jnp.asarray(golden["input"].transpose(0, 2, 3, 1))


def state_of(golden):
    return {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}


def load(golden, state):
    return models.from_torch_state(
        str(golden["meta/arch"]),
        state,
        num_classes=int(golden["meta/classes"]),
        symmetric=bool(golden["meta/stable"]),
        step_size=float(golden["meta/stability_coeff"]),
        weight_bits=int(golden["meta/weight_bits"]) or None,
        act_bits=int(golden["meta/activation_bits"]) or None,
    )


def first_stage(small_golden_dir, name):
    """What the repository has of a published network, and its state with any numbers behind the first stage."""
    golden = dict(np.load(small_golden_dir / f"{name}_stage0.npz"))
    state, rng = state_of(golden), np.random.default_rng(0)
    for line in golden["shapes"]:
        later, *shape = line.split()
        state[later] = rng.uniform(1, 2, [int(size) for size in shape]).astype(np.float32)
    return golden, state


def assert_close(name, actual, expected, what):
    """1e-4 relative in full precision. In 4 bits a tie may flip a code, so the median counts, at 1e-3."""
    error = np.abs(np.asarray(actual) - expected)
    scale = np.abs(expected).max() + 1e-12
    if name.endswith("fp32"):
        assert error.max() <= 1e-4 * scale, f"{what}: {error.max() / scale:.2e}"
    else:
        assert np.median(error) <= 1e-3 * scale, f"{what}: {np.median(error) / scale:.2e}"


@pytest.mark.parametrize("name", ["resnet20_fp32", "stablenet20_w4a4"])
def test_a_corner_of_the_first_stage_needs_no_data(small_golden_dir, name):
    """A block's output at a corner depends on a larger corner of the images, by a pixel for each convolution before."""
    golden, state = first_stage(small_golden_dir, name)
    model, variables = load(golden, state)
    images = golden["input"].transpose(0, 2, 3, 1)
    _, states = jax.jit(lambda v, x: model.apply(v, x, return_states=True))(variables, images)
    for i, known in enumerate((9, 7, 5)):  # of 12 pixels, one lost in the stem and two in each block
        expected = golden[f"eval/block/{i}"]
        assert expected.shape == (2, 16, known, known)
        assert_close(name, states[i][:, :known, :known].transpose(0, 3, 1, 2), expected, f"block {i}")


@pytest.mark.parametrize("net", NETS, indirect=True)
def test_logits_and_every_block_in_evaluation(net):
    name, golden, model, variables, x = net
    logits, states = jax.jit(lambda v, x: model.apply(v, x, return_states=True))(variables, x)
    assert_close(name, logits, golden["eval/logits"], "logits")
    for i, state in enumerate(states):
        assert_close(name, state[:2].transpose(0, 3, 1, 2), golden[f"eval/block/{i}"], f"block {i}")


@pytest.mark.parametrize("net", QUANTIZED, indirect=True)
def test_no_more_than_one_code_in_a_hundred_flips(net):
    _, golden, model, variables, x = net
    _, states = jax.jit(lambda v, x: model.apply(v, x, return_states=True))(variables, x)
    clips = [
        c
        for s in range(3)
        for g in sorted(variables["params"][f"stage{s}"])
        for c in variables["params"][f"stage{s}"][g]["act_clips"][:, 0]
    ]
    flipped = total = 0
    for i, state in enumerate(states[:-1]):
        clip = float(clips[i + 1])
        codes = qpde.quantizers.encode_activation(state[:2].transpose(0, 3, 1, 2), clip, 4).codes
        expected = qpde.quantizers.encode_activation(jnp.asarray(golden[f"eval/block/{i}"]), clip, 4).codes
        flipped += int((codes != expected).sum())
        total += codes.size
    assert flipped <= 0.01 * total


@pytest.mark.parametrize("net", NETS, indirect=True)
def test_loss_gradients_and_statistics_in_training(net):
    name, golden, model, variables, x = net
    labels = jnp.asarray(golden["labels"].astype(np.int32))

    @jax.jit
    def value_and_gradient(params):
        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
            return -picked.mean(), (logits, updates)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logits, updates)), gradient = value_and_gradient(variables["params"])
    assert_close(name, logits, golden["train/logits"], "logits")
    np.testing.assert_allclose(loss, golden["train/loss"], rtol=1e-4 if name.endswith("fp32") else 5e-3)

    def assert_gradients_close(name, actual, expected, what):
        """A ReLU whose input is 0 up to rounding may open, and one channel's gradient move by a thousandth."""
        if name.endswith("fp32"):
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
            assert error <= 1e-3, f"{what}: {error:.2e}"
        else:
            assert_close(name, actual, expected, what)

    def read(kind):
        return lambda torch_name: golden.get(f"train/{kind}/{torch_name}", np.asarray(np.nan, np.float32))

    for kind, collection, actual in (
        ("grad", "params", gradient),
        ("state", "batch_stats", updates["batch_stats"]),
    ):
        expected = tree_from_torch(model, read(kind), collections=(collection,))[collection]
        paths = jax.tree_util.tree_leaves_with_path(expected)
        compared = 0
        for (path, e), a in zip(paths, jax.tree.leaves(actual), strict=True):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            if "clips" in where and name.endswith("fp32"):
                continue  # full-precision nets have no clips
            for j in np.ndindex(e.shape[:1]) if "stage" in where else [()]:
                assert not np.isnan(e[j]).any(), where
                check = assert_gradients_close if kind == "grad" else assert_close
                check(name, a[j], e[j], f"{kind} {where}{j}")
                compared += 1
        assert compared > 20


def test_missing_extra_and_misshapen_arrays_are_refused_by_name(small_golden_dir):
    _, state = first_stage(small_golden_dir, "resnet20_fp32")

    def load(state, **options):
        models.from_torch_state("resnet20", state, **({"num_classes": 10, "symmetric": False} | options))

    with pytest.raises(ValueError, match=r"lacks 'conv1'"):
        load({k: v for k, v in state.items() if k != "conv1"})
    with pytest.raises(ValueError, match="conv2_weight"):
        load(state, symmetric=True)
    with pytest.raises(ValueError, match=r"head/bias has shape \(10,\).*\(12,\)"):
        load(state, num_classes=12)
    symmetric = {k: v for k, v in state.items() if "conv2_weight" not in k or ".0.conv2" in k}
    with pytest.raises(ValueError, match="norm='separate'"):
        load(symmetric, symmetric=True, norm="spectral")


def test_a_symmetric_mobilenet_is_read_as_far_as_its_state_goes():
    with pytest.raises(ValueError, match="the state lacks"):  # its smallest image is larger than its strides
        models.from_torch_state("mobilenetv2", {}, num_classes=10, symmetric=True)


@pytest.fixture
def published(monkeypatch):
    """A network of one block, and a state with all its names."""
    tiny = registry.Architecture("tiny", BasicBlock, ((4, 4, 1, 1, 1),))
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", tiny)
    names = {
        "conv1": (4, 3, 3, 3),
        **{f"layers.0.0.{conv}_weight": (4, 4, 3, 3) for conv in ("conv1", "conv2")},
        **{f"layers.0.0.{q}_quantizer.alpha": () for q in ("conv1", "conv2", "act1", "act2")},
        **{f"{at}.{part}": (4,) for at in ("bn1", "layers.0.0.bn1", "layers.0.0.bn2") for part in NORM_PARTS},
        "dense_output.weight": (3, 4),
        "dense_output.bias": (3,),
    }
    options = {"num_classes": 3, "weight_bits": 4, "act_bits": 4, "symmetric": False}
    state = {name: np.ones(shape, np.float32) for name, shape in names.items()}
    return state, lambda state: models.from_torch_state("tiny", state, **options)[1]


NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.module."])
def test_a_prefix_of_all_names_is_named_with_its_remedy(published, prefix):
    state, load = published
    with pytest.raises(ValueError, match=rf"lacks 'conv1'.*begin with '{prefix}': pass \{{k.removeprefix"):
        load({prefix + name: value for name, value in state.items()})


def test_a_clip_of_one_number_is_a_clip_whatever_its_shape(published):
    state, load = published
    plain = load(state)
    boxed = load({k: v.reshape(1) if k.endswith("alpha") else v for k, v in state.items()})
    jax.tree.map(np.testing.assert_array_equal, plain, boxed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv1", np.nan, "'conv1' of the state holds NaN or infinite"),
        ("layers.0.0.conv1_weight", np.inf, "'layers.0.0.conv1_weight' .* NaN or infinite"),
        ("layers.0.0.bn1.running_mean", np.nan, "running_mean' .* NaN or infinite"),
        ("bn1.running_var", -1.0, r"'bn1.running_var' .* negative variance -1"),
        ("layers.0.0.act1_quantizer.alpha", -2.0, r"act1_quantizer.alpha' .*\(=-2.0\) must be one positive number"),
        ("layers.0.0.conv1_quantizer.alpha", 0.0, r"\(=0.0\) must be one positive number"),
        ("layers.0.0.act2_quantizer.alpha", np.nan, "NaN or infinite"),
    ],
)
def test_numbers_that_no_network_has_are_refused_by_name(published, name, value, message):
    state, load = published
    with pytest.raises(ValueError, match=message):
        load(state | {name: np.full_like(state[name], value)})


def test_several_clips_for_one_quantizer_are_refused(published):
    state, load = published
    with pytest.raises(ValueError, match=r"alpha' of the state \(=\[1.0, 2.0\]\) must be one positive number"):
        load(state | {"layers.0.0.act1_quantizer.alpha": np.float32([1, 2])})
