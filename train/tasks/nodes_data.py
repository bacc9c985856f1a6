"""The graph of an experiment, on the device."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import qpde.datasets
from qpde.datasets import NodeGraph
from train.config.graphs import GraphData
from train.data.resident import data_root
from train.steps.losses import IGNORED
from train.tasks.nodes_step import Task


def load_graph(config: GraphData, data_dir: Path | None) -> NodeGraph:
    """The graph as `qpde.datasets` returns it.

    Args:
      config: which one.
      data_dir: root of the data; None takes the environment's.
    Raises:
      ValueError: the graph lies in files and no folder is given.
      FileNotFoundError: the files are not in the folder.
    """
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
