"""The graph of an experiment, on the device."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import qpde.datasets
from qpde.datasets import NodeGraph
from train.config.graphs import OWN_GRAPH, GraphData
from train.data.records import DataError
from train.data.resident import data_root, own_path
from train.runs.directory import RunDirectory
from train.steps.losses import IGNORED
from train.tasks.nodes_step import Task

_GRAPH = "graph.json"


def load_graph(config: GraphData, data_dir: Path | None) -> NodeGraph:
    """The graph as `qpde.datasets` returns it.

    Args:
      config: which one.
      data_dir: root of the data; None takes the environment's.
    Raises:
      ValueError: the graph lies in files and no folder is given.
      FileNotFoundError: the files are not in the folder.
    """
    if config.name.startswith(OWN_GRAPH):
        path = own_path(config.name.removeprefix(OWN_GRAPH), data_dir)
        graph = qpde.datasets.load_node_graph(path, seed=config.split_seed)
        return qpde.datasets.random_split(graph, seed=config.split_seed) if config.split == "random" else graph
    if config.name == "digits":
        return qpde.datasets.load_digits_graph(seed=config.split_seed)
    root = data_root(config.name, data_dir)
    return qpde.datasets.load_planetoid(config.name, root, split=config.split, seed=config.split_seed)


def make_task(graph: NodeGraph) -> Task:
    """The graph with sparse features and one row of labels for each split."""

    def labels_of(nodes):
        labels = np.full(graph.num_nodes, IGNORED, np.int32)
        labels[nodes] = graph.labels[nodes]
        return jnp.asarray(labels)

    return Task(graph.to_jraph(), labels_of(graph.train), labels_of(graph.validation), labels_of(graph.test))


def check_same_graph(run: RunDirectory, fingerprint: str) -> None:
    """Note which graph a run is on, or check that a run that goes on is still on it.

    Raises:
      DataError: the graph is another than when the run began.
    """
    path = run.path / _GRAPH
    if not path.exists():
        path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
    elif json.loads(path.read_text())["fingerprint"] != fingerprint:
        raise DataError(
            f"the graph has changed since {run.path} began: restore the old file, or give --name or --overwrite"
        )
