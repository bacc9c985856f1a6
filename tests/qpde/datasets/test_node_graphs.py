"""Own graphs: every promise about edges, splits and files, and the ways in."""

import re

import networkx
import numpy as np
import pytest

import qpde
from qpde.datasets import NodeGraph, load_node_graph

X = np.arange(24).reshape(8, 3) % 5
Y = np.array([0, 1, 0, 1, 0, 1, 0, -1])
EDGES = np.array([[0, 1, 1, 2, 3, 3, 5], [1, 0, 2, 1, 3, 4, 0]])  # both directions, a loop, and 6 and 7 alone

NO_FILE = r"no \.npz file of plain arrays"


def test_edges_are_those_of_an_undirected_graph_however_they_are_given():
    graph = NodeGraph.from_arrays(X, Y, EDGES)
    assert list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)) == [(0, 1), (1, 2), (3, 4), (0, 5)]
    np.testing.assert_array_equal(graph.dense_features(), X)
    assert (graph.num_features, graph.num_classes, graph.num_nodes) == (3, 2, 8)
    for other in (EDGES.T, EDGES[::-1], EDGES[:, ::-1]):
        assert NodeGraph.from_arrays(X, Y, other).fingerprint == graph.fingerprint
    assert NodeGraph.from_arrays(X, Y, EDGES[:, 1:6]).fingerprint != graph.fingerprint
    jraph = graph.to_jraph()  # a node alone has degree 1
    np.testing.assert_allclose(qpde.graphs.normalize(jraph)[6:], 1)


def test_a_split_is_the_given_one_or_drawn_with_the_classes_in_proportion():
    masks = {name: np.arange(8) == i for i, name in enumerate(("train", "validation", "test"))}
    graph = NodeGraph.from_arrays(X, Y, EDGES, **masks)
    assert [graph.train.tolist(), graph.validation.tolist(), graph.test.tolist()] == [[0], [1], [2]]
    as_numbers = NodeGraph.from_arrays(X, Y, EDGES, train=[4, 0], validation=[1], test=[2])
    assert as_numbers.train.tolist() == [0, 4]
    labels = np.repeat([0, 1], [60, 40])
    drawn = NodeGraph.from_arrays(np.eye(100), labels, EDGES)
    parts = [drawn.train, drawn.validation, drawn.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[36, 24], [12, 8], [12, 8]]
    assert NodeGraph.from_arrays(np.eye(100), labels, EDGES, seed=1).fingerprint != drawn.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[0]}, r"`x` must be finite numbers \(nodes, features\)"),
        ({"x": X * np.nan}, "finite"),
        ({"y": Y[:3]}, "one for each of the 8 nodes"),
        ({"y": np.array(list("abababab"))}, "makes numbers of names"),
        ({"y": Y - 1}, "whole numbers from 0 on, -1"),
        ({"edge_index": EDGES[0]}, r"\(2, edges\) or \(edges, 2\)"),
        ({"edge_index": EDGES * 1.0}, "whole numbers"),
        ({"edge_index": EDGES + 5}, "0 .. 7"),
        ({"edge_weight": np.full(7, 0.5)}, "leave the weights out"),
        ({"train": [0]}, "or none of them"),
        ({"train": [0], "validation": [0], "test": [1]}, "must not share a node"),
        ({"train": [0], "validation": [1], "test": [7]}, "test node 7 has the label -1"),
        ({"train": [0], "validation": [1], "test": [8]}, "`test` must name nodes in 0 to 7"),
        ({"train": [0], "validation": [1], "test": np.array([0.5])}, "a mask"),
        ({"y": np.array([0, 1, 0, 1, -1, -1, -1, -1])}, "5 at least"),
        ({"classes": ["a", "b", "c"], "y": Y + 2}, "labels inside the splits must lie in 0 to 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        NodeGraph.from_arrays(**{"x": X, "y": Y, "edge_index": EDGES, **changes})


def test_weights_of_one_are_none():
    weighted = NodeGraph.from_arrays(X, Y, EDGES, edge_weight=np.ones(7))
    assert weighted.fingerprint == NodeGraph.from_arrays(X, Y, EDGES).fingerprint


def test_a_graph_of_networkx_keeps_its_nodes_classes_and_split():
    graph = networkx.DiGraph()
    for node, (row, label) in zip("abcdefgh", zip(X, ["cat", "dog"] * 4, strict=True), strict=True):
        graph.add_node(node, x=row.tolist(), y=label)
    graph.nodes["h"]["y"] = None
    graph.add_edges_from(("abcdefgh"[a], "abcdefgh"[b]) for a, b in EDGES.T)
    found = NodeGraph.from_networkx(graph)
    assert found.classes == ("cat", "dog")
    assert found.fingerprint == NodeGraph.from_arrays(X, Y, EDGES).fingerprint
    for node, part in zip("abc", ("train", "validation", "test"), strict=True):
        graph.nodes[node]["split"] = part
    assert NodeGraph.from_networkx(graph).test.tolist() == [2]
    graph.add_node("i")
    with pytest.raises(ValueError, match="node 'i' has no attribute 'x'"):
        NodeGraph.from_networkx(graph)
    with pytest.raises(ValueError, match="no node has an attribute 'kind'"):
        NodeGraph.from_networkx(graph.subgraph("abc"), label="kind")


def test_a_file_holds_what_from_arrays_takes_by_either_names(tmp_path):
    path, masks = tmp_path / "graph.npz", {name: np.arange(8) == i for i, name in enumerate(("train", "val", "test"))}
    np.savez(path, x=X, y=Y, edge_index=EDGES, classes=["a", "b"], **{f"{k}_mask": v for k, v in masks.items()})
    graph = load_node_graph(path)
    assert graph.classes == ("a", "b")
    assert graph.validation.tolist() == [1]
    np.savez(path, x=X, y=Y, edge_index=EDGES, train=[0], validation=[1], test=[2])
    assert load_node_graph(path).fingerprint == graph.fingerprint


def test_files_that_are_no_graph_are_named(tmp_path):
    path = tmp_path / "graph.npz"
    with pytest.raises(FileNotFoundError, match=r"no file .*graph\.npz"):
        load_node_graph(path)
    good = {"x": X, "y": Y, "edge_index": EDGES}
    for arrays, message in (
        ({"x": X, "y": Y}, "lacks 'edge_index'"),
        ({**good, "position": X}, "holds 'position', which is unknown"),
        ({**good, "train": [0], "train_mask": Y == 0}, "both 'train' and 'train_mask'"),
        ({**good, "y": Y[1:]}, r"graph\.npz: `y` must be"),
        ({**good, "x": np.array([{}], object)}, NO_FILE),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            load_node_graph(path)
    np.save(path.with_suffix(".npy"), X)
    for content in (
        path.with_suffix(".npy").read_bytes(),
        b"",
        b"PK\x03\x04 cut",
        (tmp_path / "graph.npz").read_bytes()[:200],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=NO_FILE):
            load_node_graph(path)


def test_the_ten_lines_of_the_documentation_make_a_graph_of_tables(tmp_path, monkeypatch, pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "guides" / "own_graph.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "edges.csv" in block]
    assert len(lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    rows = ["name,kind,weight,height", *(f"n{i},{'ab'[i % 2]},{i},{i * i}" for i in range(10))]
    (tmp_path / "nodes.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "edges.csv").write_text("\n".join(f"n{i},n{(i + 1) % 10}" for i in range(10)) + "\n")
    exec(lines, {})
    graph = load_node_graph(tmp_path / "graph.npz")
    assert graph.classes == ("a", "b")
    assert len(graph.senders) == 10
    np.testing.assert_array_equal(graph.dense_features()[3], [3, 9])
