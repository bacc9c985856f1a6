"""`qpde export`: the files of a network folder, what is said of them, and what is refused."""

import argparse
import hashlib
import json

import jax
import numpy as np
import pytest
from flax.core import freeze
from folded_networks import network

import qpde
from qpde import deploy, graphs, models
from qpde.deploy.command import DESCRIPTION, add_arguments, run


def export(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, variables, _ = network()
    mean, std = [0.5] * 3, [0.2] * 3
    # A FrozenDict is written like a plain one.
    return qpde.save(
        tmp_path_factory.mktemp("net"), model, freeze(variables), input_shape=(8, 8, 3), mean=mean, std=std
    )


def test_a_folder_is_all_that_is_needed(folder, tmp_path, capsys):
    formats = list(deploy.FORMATS)
    assert (
        export(folder, "--format", *formats, "--bits", "W4A4", "--settle", "--outer-bits", "8", "--out", tmp_path) == 0
    )
    files = {name: (tmp_path / name).read_bytes() for name in deploy.FORMATS.values()}
    assert {path.name for path in tmp_path.iterdir()} == {*files, DESCRIPTION}
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    assert described["bits"] == {"weights": 4, "activations": 4}
    assert (described["settled"], described["mean"], described["image_size"]) == (True, [0.5] * 3, [8, 8])
    assert all(margin["safe"] for margin in described["margins"])
    for name, content in files.items():
        assert described["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    printed = capsys.readouterr().out
    assert "quantizers are away from every reachable sum" in printed
    assert f"theory: {described['theoretical_bytes']:,} bytes" in printed
    folded = deploy.load_packed(tmp_path / "network.safetensors")
    assert folded.settled
    assert deploy.theoretical_bytes(folded) == described["theoretical_bytes"]
    for name, content in files.items():
        assert f"{name}: {len(content):,} bytes" in printed


def test_what_settling_would_mend_is_said(folder, tmp_path, capsys):
    export(folder, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "--settle moves norms a little" in printed
    assert "block0.q0 (real numbers arrive)" in printed


def test_a_packed_file_is_within_seven_per_cent_of_theory_and_a_bounded_header(folder, tmp_path):
    for options in ([], ["--settle"], ["--outer-bits", "8"]):
        export(folder, "--out", tmp_path, *options)
        described = json.loads((tmp_path / DESCRIPTION).read_text())
        size = described["files"]["network.safetensors"]["bytes"]
        assert described["theoretical_bytes"] < size < 1.07 * described["theoretical_bytes"] + 2500


def test_a_graph_network_is_exported_by_the_same_command(tmp_path):
    graph = graphs.from_edges([0, 1, 2, 3], [1, 2, 3, 0], num_nodes=5, nodes=np.eye(5, dtype=np.float32))
    model = models.create("pde_gcn", layers=2, num_classes=3, weight_bits=4, act_bits=8)
    variables = model.init(jax.random.key(0), graph)
    net = qpde.save(tmp_path / "net", model, freeze(variables))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no format 'c': use packed or stablehlo"):
        export(net, "--format", "c", "--out", out)
    with pytest.raises(ValueError, match="needs graph_size"):
        export(net, "--format", "stablehlo", "--out", out)
    with pytest.raises(ValueError, match="leave them out for a graph network"):
        export(net, "--settle", "--out", out)
    assert not out.exists()
    assert export(net, "--format", "packed", "stablehlo", "--graph-size", 5, 4, "--out", out) == 0
    expected = model.apply(variables, graph)
    np.testing.assert_array_equal(deploy.load_packed(out / "network.safetensors")(graph), expected)
    exported = jax.export.deserialize(bytearray((out / "network.stablehlo").read_bytes()))
    np.testing.assert_allclose(exported.call(graph.nodes, graph.senders, graph.receivers), expected, atol=1e-6)
    assert json.loads((out / DESCRIPTION).read_text())["graph_size"] == [5, 4]


def test_bad_requests_are_refused_and_leave_the_old_files(folder, tmp_path, capsys):
    export(folder, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in (
        (["--bits", "4x4"], "neither like W4A8"),
        (["--outer-bits", "4"], "outer_bits=4 must be 8"),
        (["--format", "c", "--image-size", "1", "8"], "too small"),
    ):
        with pytest.raises(ValueError, match=message):
            export(folder, "--out", tmp_path, *arguments)
    with pytest.raises(SystemExit, match="2"):
        export(folder, "--out", tmp_path, "--format", "tflite")
    assert "invalid choice: 'tflite'" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="holds no trained network"):
        export(tmp_path, "--out", tmp_path / "new")


def test_bits_of_a_network_that_was_trained_without_are_refused(tmp_path):
    model, variables, _ = network(weight_bits=None, act_bits=None)
    net = qpde.save(tmp_path / "net", model, variables)
    with pytest.raises(ValueError, match=r"trained without bits for its weights.*quantize it first"):
        export(net, "--bits", "W4A4", "--out", tmp_path / "out")
    assert export(net, "--out", tmp_path / "out") == 0  # in float32
