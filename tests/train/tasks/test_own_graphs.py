"""Own graphs from the command line: trained, kept where `qpde.load` reads it, and told from a changed file."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import qpde
from qpde.datasets import load_node_graph
from train.commands.cli import main
from train.config.graphs import GraphData


def write(path, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1, 2], 12)
    same = [(a, b) for a in range(36) for b in range(a) if y[a] == y[b] and rng.random() < 0.5]
    x = rng.standard_normal((36, 4)) + np.eye(3, 4)[y]
    np.savez(path, x=x, y=y, edge_index=np.array(same).T, classes=["ant", "bee", "cat"])


OPTIONS = [
    *("--only", "symmetric", "--epochs", "4", "--tune-epochs", "2", "--seeds", "2", "--bits", "4", "4"),
    *("--model.layers", "1", "--model.width", "4", "--report-every", "4"),
]


@pytest.mark.usefixtures("compiled_once")
@jax.numpy_dtype_promotion("standard")  # of optax
def test_an_own_graph_trains_and_its_networks_load_without_it(tmp_path, monkeypatch, capsys, pytestconfig):
    monkeypatch.chdir(tmp_path)
    write("graph.npz")
    config = str(pytestconfig.rootpath / "configs/digits_graph.py")
    command = ["run", config, "--data.name", "npz/graph.npz", "--name", "mine", *OPTIONS]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("on 4 cpu devices (cpu)")
    graph = load_node_graph("graph.npz")
    results = json.loads(Path("runs/mine/summary.json").read_text())["variants"]["symmetric"]
    for part, bits in (("full", qpde.Bits()), ("W4A4", qpde.Bits(4, 4))):
        network = qpde.load(f"runs/mine/symmetric/{part}")
        assert network.model.bits == bits
        assert network.classes == ("ant", "bee", "cat")
        assert len(network.about["data_fingerprint"]) == 64
        chosen = network.predict(graph.to_jraph())
        accuracy = np.mean(chosen[graph.test] == graph.labels[graph.test])
        assert accuracy == pytest.approx(results[part]["accuracy"][network.about["seed"]])
    write("graph.npz", seed=1)
    Path("runs/mine/summary.json").unlink()
    assert main(command) == 1
    assert "the graph has changed since runs/mine began" in capsys.readouterr().err


def test_names_of_graphs_are_checked_and_paths_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert GraphData("npz/a.npz").name == f"npz/{tmp_path}/a.npz"
    for name, message in (
        ("coral", "did you mean 'cora'"),
        ("npz/", "choose digits, cora, citeseer, pubmed, npz/PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphData(name)
    with pytest.raises(ValueError, match="names its parts in the file"):
        GraphData("npz/a.npz", split="full")
