"""A packed file holds a network number for number, and nothing but whole files is read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from folded_networks import network

from qpde import deploy, graphs, models
from qpde.deploy.files import write_whole


def equal(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        fields = dataclasses.fields(a)
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("kind", ["symmetric", "tied", "huber", "pot", "apot", "stable", "inverted", "W8A8", "W2A2"])
@pytest.mark.parametrize("outer_bits", [None, 8])
def test_a_network_comes_back_number_for_number(tmp_path, kind, outer_bits):
    folded = deploy.settle(deploy.fold(*network(kind)[:2], outer_bits=outer_bits))
    loaded = deploy.load_packed(deploy.save_packed(tmp_path / "n.safetensors", folded))
    assert equal(folded, loaded)
    assert loaded.settled


@pytest.mark.parametrize(("symmetric", "limit"), [(True, 105_000), (False, 155_000)])
def test_resnet20_of_4_bits_is_as_small_as_promised(tmp_path, symmetric, limit):
    model = models.create("resnet20", num_classes=10, symmetric=symmetric, weight_bits=4, act_bits=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.5, s.shape), s.dtype), shapes)
    for folded in (deploy.fold(model, variables), deploy.fold(model, variables, outer_bits=8)):
        path = deploy.save_packed(tmp_path / "n.safetensors", folded)
        assert path.stat().st_size <= limit
        theory = sum(-(-k.values.size * (k.bits or 32) // 8) for k in folded.kernels.values())
        assert path.stat().st_size < 1.15 * theory


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "n.safetensors"
    return deploy.save_packed(path, deploy.fold(*network("W2A2")[:2])).read_bytes()


def test_a_file_that_was_cut_is_refused(tmp_path, content):
    for length in (0, 4, 8, 50, len(content) // 2, len(content) - 1):
        path = write_whole(tmp_path / "cut.safetensors", content[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors is no safetensors file, or was cut"):
            deploy.load_packed(path)


def test_a_file_that_was_padded_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"padded\.safetensors is no safetensors file"):
        deploy.load_packed(write_whole(tmp_path / "padded.safetensors", content + b"\0"))


def test_a_file_that_was_altered_is_refused(tmp_path, content):
    start = 8 + int.from_bytes(content[:8], "little")
    for place in np.linspace(start, len(content) - 1, 20).astype(int):
        altered = bytearray(content)
        altered[place] ^= 1
        with pytest.raises(ValueError, match=r"altered\.safetensors was altered"):
            deploy.load_packed(write_whole(tmp_path / "altered.safetensors", bytes(altered)))


def test_another_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors is no packed network"):
        deploy.load_packed(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        deploy.load_packed(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"x":"images"', '"x":"nowhere"'), ('"record":"Conv"', '"record":"Exec"'), ('"codes":[2,', '"codes":[5,')],
)
def test_a_forged_program_with_a_right_digest_is_refused(tmp_path, content, old, new):
    import zlib

    from qpde.deploy import files

    tensors = safetensors.numpy.load(content)
    text = zlib.decompress(tensors["program"].tobytes()).decode()
    assert old in text
    tensors["program"] = np.frombuffer(zlib.compress(text.replace(old, new, 1).encode()), np.uint8)
    path = write_whole(tmp_path / "forged.safetensors", files.seal(tensors, files.FORMAT))
    with pytest.raises(ValueError, match=r"forged\.safetensors does not describe a network"):
        deploy.load_packed(path)


def test_the_header_does_not_grow_with_depth(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert len(header) <= 7


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match=r"."):
        write_whole(target, b"data")  # a folder has this name
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "options", [{"name": "pde_gcn", "levels": "uniform"}, {"name": "gcn"}, {"name": "gat", "width": 16}]
)
def test_a_graph_network_comes_back_with_its_logits(tmp_path, options):
    graph = graphs.from_edges([0, 1, 2, 3], [1, 2, 3, 0], num_nodes=5, nodes=np.eye(5, dtype=np.float32))
    model = models.create(**options, num_classes=3, weight_bits=3, act_bits=8)
    variables = model.init(jax.random.key(0), graph)
    folded = deploy.fold_graph(model, variables)
    loaded = deploy.load_packed(deploy.save_packed(tmp_path / "g.safetensors", folded))
    assert equal(folded, loaded)
    np.testing.assert_array_equal(loaded(graph), model.apply(variables, graph))
