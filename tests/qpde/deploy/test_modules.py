"""Own modules packed, in files and as programs: the outputs are those of the network, number for number."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpde
from qpde import deploy, models
from qpde.bits import Bits
from qpde.nn import Rule, SymmetricStep, quantized

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 3)), jnp.float32)


AXES = {"params": 0, "observed": 0, "states": 0}


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Conv(6, (3, 3))(x)), None


class Net(nn.Module):
    """Every way in which kernels are stored: alone, per channel, stacked by a scan, and in steps."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, name="stem")(x)
        x, _ = nn.scan(Body, variable_axes=AXES, split_rngs={"params": True}, length=2)(name="loop")(x, None)
        x = SymmetricStep(steps=2, weights=4, activations=4, per_channel=True, norm="tied", name="steps")(x)
        x = nn.ConvTranspose(5, (2, 2), strides=(2, 2), transpose_kernel=True, name="up")(x)
        x = nn.DenseGeneral((2, 3), name="axes")(nn.relu(x).mean((1, 2)))
        return nn.DenseGeneral(4, axis=(-2, -1), name="head")(x)


RULES = [
    Rule("stem", weights=3, activations=4, signed=True, standardize=True),
    Rule("loop", weights=2, activations=4, signed="auto"),
    Rule("up", weights=5, activations=4, signed=True, per_channel=True),
    Rule("axes", weights=4, activations=4, signed=True, levels="pot"),
    Rule("head", leave_alone=True),
]


@pytest.fixture(scope="module")
def network():
    model = quantized(Net(), RULES)
    own = jax.jit(model.init)(jax.random.key(0), X)
    model = model.with_signs(own, [X])
    return model, jax.device_get(own)


def test_a_packed_module_gives_the_same_outputs_in_fewer_bytes(network, tmp_path):
    model, variables = network
    packed = deploy.pack_module(model, variables, X)
    assert {path: kernel.bits for path, kernel in packed.kernels.items()} == {
        "params/stem/kernel": 3,
        "params/loop/Conv_0/kernel": 2,
        "params/steps/blocks0to1/kernel1": 4,
        "params/up/kernel": 8,
    }
    run = jax.jit(lambda variables, bits: model.apply(variables, X, bits=bits))
    expected = model.apply(variables, X)
    np.testing.assert_array_equal(packed.apply(model, X), expected)
    assert packed.nbytes < sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    loaded = deploy.load_module(deploy.save_module(tmp_path / "net.safetensors", packed))
    assert loaded.signs == model.signs
    np.testing.assert_array_equal(loaded.apply(quantized(Net(), RULES), X), expected)
    other = deploy.pack_module(model, variables, X, bits=Bits(8, 3))
    assert other.act_bits == 3
    np.testing.assert_array_equal(
        run(other.variables(), Bits(None, jnp.int32(3))), run(variables, Bits(jnp.int32(8), jnp.int32(3)))
    )
    exact = deploy.pack_module(model, variables, X, bits=Bits())
    assert not exact.kernels


def test_a_program_holds_kernels_packed_and_takes_any_batch(network):
    model, variables = network
    packed = deploy.pack_module(model, variables, X)
    exported = deploy.export_module(model, packed, X.shape[1:])
    content = exported.serialize()
    program = jax.export.deserialize(content)
    assert program.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 4):
        expected = model.apply(variables, X[:count])
        np.testing.assert_allclose(program.call(X[:count]), expected, rtol=1e-5, atol=1e-5)
    assert packed.kernels["params/stem/kernel"].data.tobytes()[:16] in content


def test_files_that_were_cut_or_altered_are_refused(network, tmp_path):
    model, variables = network
    path = deploy.save_module(tmp_path / "net.safetensors", deploy.pack_module(model, variables, X))
    content = path.read_bytes()
    for changed, message in (
        (content[:-1], "cut or padded"),
        (content[:-1] + bytes([content[-1] ^ 1]), "was altered"),
        (content.replace(b"[3, 3, 3, 3, 6]", b"[3, 3, 3, 6, 3]"), "was altered"),
    ):
        path.write_bytes(changed)
        assert changed != content
        with pytest.raises(ValueError, match=message):
            deploy.load_module(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        deploy.load_module(tmp_path / "other")
    folded = tmp_path / "packed.safetensors"
    folded.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match="no packed module of qpde: format None"):
        deploy.load_module(folded)
    with pytest.raises(ValueError, match=r"Network is no network of qpde\.quantized.*deploy\.fold"):
        deploy.pack_module(models.create("resnet20", num_classes=2), {}, X)


def test_an_own_network_is_saved_and_loaded_with_its_bits_signs_and_classes(network, tmp_path):
    model, variables = network
    mine = model.with_bits(Bits(4, 4))
    names = ["a", "b", "c", "d"]
    qpde.save(tmp_path, mine, variables, classes=names, input_shape=(8, 8, 3), mean=[0.5] * 3, std=[0.25] * 3)
    found = qpde.load(tmp_path, model=quantized(Net(), RULES))
    assert (found.model.bits, found.model.signs) == (Bits(4, 4), model.signs)
    images = np.asarray(jax.nn.sigmoid(X))
    expected = mine.apply(variables, (images - 0.5) / 0.25)
    np.testing.assert_allclose(found.logits(images), expected, rtol=1e-4, atol=1e-5)
    assert [found.classes[k] for k in found.predict(images)] == [names[k] for k in expected.argmax(-1)]
    with pytest.raises(ValueError, match=r"weights of your own module Net, not its code.*model=qpde\.quantized\(Net"):
        qpde.load(tmp_path)
    with pytest.raises(ValueError, match="weights of a Net, not of a Dense"):
        qpde.load(tmp_path, model=quantized(nn.Dense(2), [Rule("", weights=4)]))
    per_channel = [RULES[0], RULES[1], Rule("up|axes", weights=4, signed=True), RULES[4]]
    with pytest.raises(ValueError, match=r"params/up/\w+ has shape"):
        qpde.load(tmp_path, model=quantized(Net(), per_channel))
    with pytest.raises(ValueError, match="names 1 classes, the network has 4"):
        qpde.save(tmp_path, mine, variables, classes=["a"], input_shape=(8, 8, 3))
    with pytest.raises(ValueError, match="give `input_shape`"):
        qpde.save(tmp_path, mine, variables)
