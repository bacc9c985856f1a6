"""One call from a trained network to the files that run it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qpde.bits import Bits
from qpde.deploy.c import c_source
from qpde.deploy.files import packed_bytes
from qpde.deploy.folded import Folded
from qpde.deploy.folding import fold
from qpde.deploy.graphs import FoldedGraph, fold_graph
from qpde.deploy.onnx import onnx_model, require
from qpde.deploy.settle import settle as settled
from qpde.deploy.stablehlo import stablehlo_bytes
from qpde.files import write_whole
from qpde.models.clips import converge_norms
from qpde.models.graphs.networks import GraphNetwork
from qpde.suggestions import did_you_mean

__all__ = ["FORMATS", "export", "fold_network", "make_formats"]

FORMATS = {
    "packed": "network.safetensors",
    "onnx": "network.onnx",
    "stablehlo": "network.stablehlo",
    "c": "network.c",
}
"""Names of the formats, and of their files."""

_GRAPH_FORMATS = ("packed", "stablehlo")


def export(
    network: Any,
    folder: str | Path,
    formats: Sequence[str] = ("packed",),
    *,
    bits: Bits | None = None,
    settle: bool = False,
    outer_bits: int | None = None,
    image_size: tuple[int, int] | None = None,
    graph_size: tuple[int, int] | None = None,
) -> list[Path]:
    """Fold a trained network once and write it in several formats.

    All that can be wrong is found before the first file is written.

    Args:
      network: Anything with `.model` and `.variables`.
      folder: For the files. It is made if there is none.
      formats: Keys of `FORMATS`.
      bits: Bit-widths. None takes the model's own.
      settle: Whether rounding thresholds are moved away from every reachable sum, see `qpde.deploy.settle`.
      outer_bits: 8 for integer kernels of stem, neck and head; None keeps them in float32.
      image_size: Height and width of the images, which "stablehlo" and "c" need. None takes the network's
        `input_shape` if it has one.
      graph_size: Nodes and edges of the graphs, which "stablehlo" needs for a graph network.
    Returns:
      The files, in the order of `formats`.
    Raises:
      ValueError: An unknown format, one that this network cannot have, or a missing size.
      ImportError: "onnx" without the extra [deploy].
    """
    if image_size is None and getattr(network, "input_shape", None) is not None:
        image_size = tuple(network.input_shape[:2])
    _check(formats, isinstance(network.model, GraphNetwork), image_size, graph_size)
    folded = fold_network(network, bits=bits, settle=settle, outer_bits=outer_bits, image_size=image_size)
    contents = make_formats(folded, formats, image_size=image_size, graph_size=graph_size)
    return [write_whole(Path(folder) / name, content) for name, content in contents.items()]


def fold_network(
    network: Any,
    *,
    bits: Bits | None = None,
    settle: bool = False,
    outer_bits: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Folded | FoldedGraph:
    """Fold a trained network of either kind, its spectral norms converged.

    Args:
      network: Anything with `.model` and `.variables`.
      bits: Bit-widths. None takes the model's own.
      settle: Whether rounding thresholds are moved.
      outer_bits: 8 or None.
      image_size: Height and width of the images. Without it spectral norms stay as they are.
    Returns:
      The folded network.
    Raises:
      ValueError: What this network cannot have.
    """
    if not isinstance(network.model, GraphNetwork):
        variables = network.variables
        if image_size is not None and "spectral" in variables:
            images = jnp.zeros((1, *image_size, variables["params"]["stem"]["kernel"].shape[2]))
            variables = converge_norms(network.model, variables, images, bits=bits)
        folded = fold(network.model, variables, bits=bits, outer_bits=outer_bits)
        return settled(folded) if settle else folded
    if settle or outer_bits is not None:
        raise ValueError("settle and outer_bits are for image networks: leave them out for a graph network")
    return fold_graph(network.model, network.variables, bits=bits)


def make_formats(
    folded: Folded | FoldedGraph,
    formats: Sequence[str],
    *,
    image_size: tuple[int, int] | None = None,
    graph_size: tuple[int, int] | None = None,
) -> dict[str, bytes]:
    """Make the files of a folded network, all of them or none.

    Args:
      folded: Result of `fold`, `settle` or `fold_graph`.
      formats: Keys of `FORMATS`.
      image_size: Height and width of the images.
      graph_size: Nodes and edges of the graphs.
    Returns:
      Content by the name of the file, in the order of `formats`.
    Raises:
      ValueError: An unknown format, one that this network cannot have, or a missing size.
      ImportError: "onnx" without the extra [deploy].
    """
    formats = list(dict.fromkeys(formats))
    _check(formats, isinstance(folded, FoldedGraph), image_size, graph_size)
    images: Any = folded  # `_check` refuses formats of images for graphs
    size: Any = image_size
    makers: dict[str, Callable[[], bytes]] = {
        "packed": lambda: packed_bytes(folded),
        "onnx": lambda: onnx_model(images, image_size=size).SerializeToString(),
        "stablehlo": lambda: stablehlo_bytes(folded, image_size=image_size, graph_size=graph_size),
        "c": lambda: c_source(images, image_size=size).encode(),
    }
    return {FORMATS[name]: makers[name]() for name in formats}


def _check(formats, is_graph, image_size, graph_size):
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}: {did_you_mean(name, FORMATS)}choose from {list(FORMATS)}")
        if is_graph and name not in _GRAPH_FORMATS:
            raise ValueError(f"a graph network has no format {name!r}: use {' or '.join(_GRAPH_FORMATS)}")
    if not formats:
        raise ValueError(f"no format is given: at least one of {', '.join(FORMATS)}")
    if is_graph and "stablehlo" in formats and graph_size is None:
        raise ValueError("format 'stablehlo' of a graph network needs graph_size=(nodes, edges)")
    sized = [name for name in formats if name in ("stablehlo", "c")]
    if not is_graph and sized and image_size is None:
        raise ValueError(f"format {sized[0]!r} needs image_size=(height, width)")
    if "onnx" in formats:
        require("onnx")
