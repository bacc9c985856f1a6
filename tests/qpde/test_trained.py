"""Trained networks in folders: what is loaded is what was saved, and what was cut or altered is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import qpde
from qpde import deploy
from qpde.models import Architecture, Smoothing, gcn, image_network
from qpde.models.images.blocks import InvertedBlock, StableBlock
from qpde.trained import DESCRIPTION, WEIGHTS

TINY = Architecture("tiny", StableBlock, ((4, 4, 2, 1, 1), (4, 6, 1, 2, 1)))
OPTIONS = {
    "norm": "spectral",
    "residual": "precise",
    "smoothing": Smoothing(blocks=(0,)),
    "head": "scaled",
    "weight_bits": 4,
    "act_bits": 4,
}


@pytest.fixture(scope="module")
def network():
    model = image_network(TINY, num_classes=3, **OPTIONS)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.fixture
def folder(network, tmp_path):
    model, variables = network
    details = {"classes": ("a", "b", "c"), "input_shape": (8, 8, 3), "mean": [0.5] * 3, "std": [0.25] * 3}
    return qpde.save(tmp_path / "net", model, variables, **details, about={"seed": 3})


def test_what_is_loaded_is_what_was_saved(network, folder):
    model, variables = network
    found = qpde.load(folder)
    assert found.model == model
    assert jax.tree.structure(found.variables) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (found.classes, found.input_shape, found.about) == (("a", "b", "c"), (8, 8, 3), {"seed": 3})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_bytes_and_floats_of_any_number_have_the_network_s_own_logits(network, folder, count):
    model, variables = network
    found = qpde.load(folder)
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    logits = found.logits(images)
    assert logits.shape == (count, 3)
    if count:
        x = (jnp.asarray(images, jnp.float32) / 255 - 0.5) / 0.25
        np.testing.assert_allclose(logits, model.apply(variables, x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.logits(images.astype(np.float32) / 255), logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.predict(images), logits.argmax(-1))


def test_networks_with_a_neck_and_networks_on_graphs_come_back(tmp_path):
    mobile = image_network(Architecture("m", InvertedBlock, ((4, 4, 1, 1, 2),), neck_width=8), num_classes=2)
    graph = qpde.graphs.from_edges(np.array([0, 1]), np.array([1, 2]), num_nodes=3, nodes=np.ones((3, 5), np.float32))
    for model, x in ((mobile, jnp.zeros((1, 8, 8, 3))), (gcn(num_classes=2, width=4, head="graph"), graph)):
        variables = jax.jit(model.init)(jax.random.key(1), x)
        found = qpde.load(qpde.save(tmp_path / type(model).__name__, model, variables))
        assert found.model == model
        np.testing.assert_allclose(found.logits(x), model.apply(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("file", [WEIGHTS, DESCRIPTION])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04foreign" + b])
def test_a_damaged_or_foreign_file_is_refused_by_name(folder, file, damage):
    path = folder / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=file):
        qpde.load(folder)


def test_one_altered_byte_of_the_weights_is_noticed(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(ValueError, match="cut short or altered"):
        qpde.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "does not describe"),
        ({"network": {"kind": "image"}}, "no network that this qpde knows"),
        ({"classes": ["a"]}, "names 1 classes"),
    ],
)
def test_what_it_does_not_know_is_refused(folder, change, message):
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        qpde.load(folder)


def test_a_network_of_before_an_option_has_its_default_and_one_of_after_is_refused(network, folder):
    path = folder / DESCRIPTION
    description = json.loads(path.read_text())
    options = description["network"]["options"]
    del options["expansion"]
    path.write_text(json.dumps(description))
    assert qpde.load(folder).model == network[0]
    options["invented"] = 1
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"\['invented'\] are unknown: it was written by a newer qpde"):
        qpde.load(folder)


def test_missing_files_and_wrong_input_are_named(network, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {DESCRIPTION}"):
        qpde.load(tmp_path)
    model, variables = network
    with pytest.raises(ValueError, match="2 classes, the network has 3"):
        qpde.save(tmp_path, model, variables, classes=("a", "b"))
    with pytest.raises(ValueError, match="the network needs"):
        qpde.save(tmp_path, model.with_options(per_channel=True), variables)
    found = qpde.load(folder)
    for images, message in ((np.zeros((8, 8, 3)), "N, H, W, C"), (np.zeros((1, 8, 8, 1), np.uint8), "1 channels")):
        with pytest.raises(ValueError, match=message):
            found.predict(images)
    with pytest.raises(ValueError, match="int32"):
        found.predict(np.zeros((1, 8, 8, 3), np.int32))


def test_a_network_that_cannot_run_is_neither_saved_nor_folded(network, folder):
    model, variables = network
    for name, value, message in (
        ("kernel1", np.nan, "stage0.*kernel1 holds NaN or infinite numbers"),
        ("act_clips", -1.0, r"act_clips holds -1\.0, and clips must be positive"),
    ):

        def spoilt(path, leaf, name=name, value=value):
            return jnp.full_like(leaf, value) if name in str(path) else leaf

        bad = jax.tree_util.tree_map_with_path(spoilt, variables)
        with pytest.raises(ValueError, match=message):
            qpde.save(folder, model, bad)
        with pytest.raises(ValueError, match=message):
            deploy.fold(model, bad)
    assert qpde.load(folder).about == {"seed": 3}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": [0.5, 0.5]}, ValueError, "`mean` has 2 values, the images have 3 channels"),
        ({"std": [0.5, 0.0, 0.5]}, ValueError, "`std`.*must be finite, and positive"),
        ({"about": {"seed": np.int64(3)}}, TypeError, "int64"),
    ],
)
def test_what_cannot_be_written_leaves_the_network_that_is_there(network, folder, options, error, message):
    with pytest.raises(error, match=message):
        qpde.save(folder, *network, **options)
    assert qpde.load(folder).about == {"seed": 3}


def test_frozen_variables_are_saved_alike(network, folder, tmp_path):
    model, variables = network
    found = qpde.load(qpde.save(tmp_path / "frozen", model, freeze(variables)))
    jax.tree.map(np.testing.assert_array_equal, found.variables, qpde.load(folder).variables)
