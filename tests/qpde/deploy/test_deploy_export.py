"""One call writes every format, or nothing."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from folded_networks import network

from qpde import Bits, deploy, graphs, models
from qpde.models.options import Smoothing


def trained(kind="symmetric", **options):
    model, variables, images = network(kind, **options)
    return SimpleNamespace(model=model, variables=variables), images


def test_every_format_is_written_and_is_one_network(tmp_path):
    net, images = trained()
    formats = ["packed", "onnx", "stablehlo", "c"]
    files = deploy.export(net, tmp_path / "new", formats, bits=Bits(4, 4), settle=True, image_size=(8, 8))
    assert [f.name for f in files] == [deploy.FORMATS[name] for name in formats]
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == sorted(deploy.FORMATS.values())
    folded = deploy.load_packed(files[0])
    assert folded.settled
    exported = jax.export.deserialize(bytearray(files[2].read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    logits = deploy.run_reference(folded, images)[0]
    for batch in (1, 3):
        np.testing.assert_allclose(exported.call(images[:batch]), logits[:batch], atol=3e-6)


def test_the_artefact_holds_packed_kernels(tmp_path):
    net, _ = trained()
    (path,) = deploy.export(net, tmp_path, ["stablehlo"], image_size=(8, 8))
    packed = sum(
        k.values.size / 2 if k.bits else 4 * k.values.size
        for k in deploy.fold(net.model, net.variables).kernels.values()
    )
    assert path.stat().st_size < packed + 20_000


def test_nothing_is_written_where_one_format_cannot_be(tmp_path):
    net, _ = trained(smoothing=Smoothing(kind="perona_malik_1"))
    with pytest.raises(ValueError, match="'perona_malik_1' has no C code: retrain with one of huber"):
        deploy.export(net, tmp_path, ["packed", "c"], image_size=(8, 8))
    with pytest.raises(ValueError, match="'perona_malik_1' has no ONNX graph"):
        deploy.export(net, tmp_path, ["packed", "onnx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["tflite"], "unknown format 'tflite': .*choose from .*'packed', 'onnx', 'stablehlo', 'c'"),
        ([], "no format is given"),
        (["c"], r"format 'c' needs image_size=\(height, width\)"),
    ],
)
def test_bad_formats_are_refused(tmp_path, formats, message):
    with pytest.raises(ValueError, match=message):
        deploy.export(trained()[0], tmp_path, formats)


@pytest.mark.parametrize("options", [{"name": "pde_gcn", "layers": 2}, {"name": "gcn"}])
def test_a_graph_network_is_exported(tmp_path, options):
    graph = graphs.from_edges([0, 1, 2, 3], [1, 2, 3, 0], num_nodes=5, nodes=np.eye(5, dtype=np.float32))
    model = models.create(**options, num_classes=3, weight_bits=4, act_bits=8)
    net = SimpleNamespace(model=model, variables=model.init(jax.random.key(0), graph))
    with pytest.raises(ValueError, match="a graph network has no format 'onnx': use packed or stablehlo"):
        deploy.export(net, tmp_path, ["onnx"])
    with pytest.raises(ValueError, match="needs graph_size"):
        deploy.export(net, tmp_path, ["stablehlo"])
    files = deploy.export(net, tmp_path, ["packed", "stablehlo"], graph_size=(5, 4))
    exported = jax.export.deserialize(bytearray(files[1].read_bytes()))
    logits = exported.call(graph.nodes, graph.senders, graph.receivers)
    np.testing.assert_allclose(logits, model.apply(net.variables, graph), atol=1e-6)
