"""Export a folded network as a serialized StableHLO program, which runs on cpu, cuda and tpu without qpde or Flax.

    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    logits = exported.call(images)

Kernels lie in it packed and are unpacked by the program itself; XLA does that once, at compile time.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax import export
from jaxtyping import Array

from qpde.deploy.folded import Folded
from qpde.deploy.graphs import FoldedGraph
from qpde.deploy.integer import evaluate
from qpde.deploy.packing import pack, unpack_traced
from qpde.deploy.program import Program
from qpde.files import write_whole

__all__ = ["PLATFORMS", "export_graph", "export_images", "save_stablehlo", "stablehlo_bytes"]

PLATFORMS = ("cpu", "cuda", "tpu")


def save_stablehlo(
    path: str | Path,
    folded: Folded | FoldedGraph,
    *,
    image_size: tuple[int, int] | None = None,
    graph_size: tuple[int, int] | None = None,
) -> Path:
    """Write a folded network as a serialized `jax.export` artefact.

    Args:
      path: Path of the file.
      folded: Result of `fold`, `settle` or `fold_graph`.
      image_size: Height and width, for an image network.
      graph_size: Nodes and edges, for a graph network.
    Returns:
      The path.
    Raises:
      ValueError: The size is missing.
    """
    return write_whole(path, stablehlo_bytes(folded, image_size=image_size, graph_size=graph_size))


def stablehlo_bytes(
    folded: Folded | FoldedGraph,
    *,
    image_size: tuple[int, int] | None = None,
    graph_size: tuple[int, int] | None = None,
) -> bytes:
    """Content of the file of `save_stablehlo`, which documents the arguments."""
    if isinstance(folded, FoldedGraph):
        if graph_size is None:
            raise ValueError("a graph network is exported for one size: give graph_size=(nodes, edges)")
        return bytes(export_graph(folded, *graph_size).serialize())
    if image_size is None:
        raise ValueError("an image network is exported for one size: give image_size=(height, width)")
    return bytes(export_images(folded, image_size).serialize())


def export_images(folded: Folded, image_size: tuple[int, int], *, codes: bool = False) -> export.Exported:
    """Export an image network with a symbolic batch.

    Args:
      folded: Result of `fold` or `settle`.
      image_size: Height and width.
      codes: Also return the codes of every quantizer by name, float32: for tests.
    Returns:
      Program of images (batch, H, W, C) float32 with the logits (batch, classes), or (batch, H, W, classes).
    """
    batch, *_ = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_size, folded.channels), jnp.float32)

    def logits(images):
        found, own_codes, _ = evaluate(folded, images, _unpacked(folded))
        return (found, own_codes) if codes else found

    return export.export(jax.jit(logits), platforms=PLATFORMS)(images)


def export_graph(folded: FoldedGraph, nodes: int, edges: int) -> export.Exported:
    """Export a graph network for graphs of one size; pad smaller ones with `jraph.pad_with_graphs`.

    Args:
      folded: Result of `fold_graph`.
      nodes: Number of nodes.
      edges: Number of edges.
    Returns:
      Program of features (nodes, F) float32, senders and receivers (edges,) int32, with the logits (nodes, classes).
    """
    features = folded.params["stem_kernel"].shape[0]

    def logits(x, senders, receivers):
        graph = jraph.GraphsTuple(
            nodes=x,
            edges=None,
            globals=None,
            senders=senders,
            receivers=receivers,
            n_node=jnp.array([nodes], jnp.int32),
            n_edge=jnp.array([edges], jnp.int32),
        )
        return folded(graph, _unpacked(folded))

    ends = jax.ShapeDtypeStruct((edges,), jnp.int32)
    x = jax.ShapeDtypeStruct((nodes, features), jnp.float32)
    return export.export(jax.jit(logits), platforms=PLATFORMS)(x, ends, ends)


def _unpacked(folded: Program | FoldedGraph) -> dict[str, Array | np.ndarray]:
    """Kernel values by name: packed constants and the operations that unpack them."""
    return {
        name: unpack_traced(pack(kernel.values, kernel.bits), kernel.bits, kernel.values.shape)
        if kernel.bits is not None
        else kernel.values
        for name, kernel in folded.kernels.items()
    }
