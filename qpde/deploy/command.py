"""`qpde export`: the files of a trained network from its folder, without data.

    qpde export NETWORK --format packed onnx stablehlo c --bits W4A4 --settle --out FOLDER

Beside the files lies export.json: classes, mean and std of the images, bit-widths, what stays in float32, and size and
SHA-256 of every file.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpde.bits import Bits, parse_bits
from qpde.deploy.export import FORMATS, fold_network, make_formats
from qpde.deploy.files import theoretical_bytes
from qpde.deploy.folded import Folded
from qpde.deploy.graphs import FoldedGraph
from qpde.deploy.settle import margins
from qpde.files import write_whole
from qpde.models.graphs.networks import GraphNetwork
from qpde.trained import TrainedNetwork, load

__all__ = ["DESCRIPTION", "add_arguments", "make_files", "run", "shown_margins", "write_files"]

DESCRIPTION = "export.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qpde export`.

    Args:
      parser: Parser of the command.
    """
    parser.add_argument(
        "network", type=Path, metavar="NETWORK", help="folder of a trained network, such as runs/digits/plain"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=["packed"],
        choices=FORMATS,
        metavar="FORMAT",
        help=f"one or several of {', '.join(FORMATS)}; default: packed",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the files")
    parser.add_argument("--bits", metavar="W4A4", help="bits of weights and activations; default: the network's own")
    parser.add_argument(
        "--settle",
        action="store_true",
        help="shift norms slightly, so that every runtime rounds every code alike",
    )
    parser.add_argument(
        "--outer-bits",
        type=int,
        metavar="8",
        help="bits of the kernels of stem, neck and head; default: they stay float32",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images; default: that of the training images",
    )
    parser.add_argument(
        "--graph-size",
        type=int,
        nargs=2,
        metavar=("NODES", "EDGES"),
        help="size of the graph; the format stablehlo needs it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export a network as the command line asks, and say what was written.

    Args:
      arguments: Of a parser with `add_arguments`.
    Returns:
      The exit status, 0.
    Raises:
      ValueError: The folder's files are damaged, or the network cannot have what is asked for.
      OSError: The folder holds no network, or a file cannot be written.
      ImportError: "onnx" without the extra [deploy].
    """
    folded, contents = make_files(
        load(arguments.network),
        arguments.format,
        bits=None if arguments.bits is None else parse_bits(arguments.bits),
        settle=arguments.settle,
        outer_bits=arguments.outer_bits,
        image_size=None if arguments.image_size is None else tuple(arguments.image_size),
        graph_size=None if arguments.graph_size is None else tuple(arguments.graph_size),
    )
    files = write_files(arguments.out, contents)
    if isinstance(folded, Folded):
        print(folded.summary())
        print(shown_margins(folded))
    theory = theoretical_bytes(folded)
    print(f"theory: {theory:,} bytes, codes at their bits and all else in float32")
    for path in files:
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def make_files(
    network: TrainedNetwork,
    formats: Sequence[str],
    *,
    bits: Bits | None = None,
    settle: bool = False,
    outer_bits: int | None = None,
    image_size: tuple[int, int] | None = None,
    graph_size: tuple[int, int] | None = None,
) -> tuple[Folded | FoldedGraph, dict[str, bytes]]:
    """Fold a trained network and make its files, export.json among them; nothing is written.

    Args:
      network: Result of `qpde.load`.
      formats: Keys of `qpde.deploy.FORMATS`.
      bits: Bit-widths. None takes the network's own.
      settle: Whether rounding thresholds are moved.
      outer_bits: 8 for integer kernels of stem, neck and head, or None.
      image_size: Height and width of the images. None takes that of the training images.
      graph_size: Nodes and edges of the graphs.
    Returns:
      The folded network, and content by the name of the file, in the order of `formats`, export.json last.
    Raises:
      ValueError: The network cannot have what is asked for; the message says what it can have.
      ImportError: "onnx" without the extra [deploy].
    """
    _check_quantized(network, bits)
    if image_size is None and network.input_shape is not None:
        image_size = (network.input_shape[0], network.input_shape[1])
    folded = fold_network(network, bits=bits, settle=settle, outer_bits=outer_bits, image_size=image_size)
    contents = make_formats(folded, formats, image_size=image_size, graph_size=graph_size)
    described = _described(network, folded, bits, image_size, graph_size)
    described["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    return folded, contents | {DESCRIPTION: (json.dumps(described, indent=2) + "\n").encode()}


def write_files(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    """Write what `make_files` made, export.json last.

    Args:
      folder: For the files. It is made if there is none.
      contents: By the name of the file.
    Returns:
      The files, in their order.
    """
    (folder / DESCRIPTION).unlink(missing_ok=True)  # never a description beside files that are not its own
    return [write_whole(folder / name, content) for name, content in contents.items()]


def shown_margins(folded: Folded) -> str:
    """How many quantizers no float32 evaluation can flip, and why not the others, as text.

    Args:
      folded: Result of `fold` or `settle`.
    """
    found = margins(folded)
    unsafe = [m for m in found if not m.is_safe]
    lines = [f"thresholds: {len(found) - len(unsafe)} of {len(found)} quantizers are away from every reachable sum"]
    near = [f"{m.name} ({m.margin:.1e} of a code, float32 errs by up to {m.float_error:.1e})" for m in unsafe]
    reasons = [f"{m.name} ({m.reason})" if m.reason else text for m, text in zip(unsafe, near, strict=True)]
    if unsafe:
        lines.append(f"  in others a runtime may round a code otherwise: {', '.join(reasons)}")
        if not folded.settled:
            lines.append("  --settle moves norms a little, so that few-bit ones cannot")
    return "\n".join(lines)


def _check_quantized(network: TrainedNetwork, bits: Bits | None) -> None:
    own = network.model.bits
    for name, has, wanted in zip(("weights", "activations"), own, own if bits is None else bits, strict=True):
        if has is None and wanted is not None:
            raise ValueError(
                f"the network was trained without bits for its {name}, so their clips mean nothing: quantize it first, "
                "by `python -m train quantize` or qpde.ptq, or leave --bits out"
            )


def _described(network, folded, bits, image_size, graph_size) -> dict[str, Any]:
    widths = network.model.bits if bits is None else bits
    described: dict[str, Any] = {
        "format": "qpde export 1",
        "classes": list(network.classes),
        "mean": None if network.mean is None else list(network.mean),
        "std": None if network.std is None else list(network.std),
        "bits": {name: None if v is None else int(v) for name, v in zip(Bits._fields, widths, strict=True)},
        "theoretical_bytes": theoretical_bytes(folded),
        "trained": network.about,
    }
    if isinstance(network.model, GraphNetwork):
        return described | {"graph_size": graph_size}
    return described | {
        "network": folded.name,
        "image_size": image_size,
        "channels": folded.channels,
        "settled": folded.settled,
        "parts": [dataclasses.asdict(note) for note in folded.notes],
        "margins": [
            {"name": m.name, "margin": _finite(m.margin), "safe": m.is_safe, "reason": m.reason}
            for m in margins(folded)
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if abs(value) < float("inf") else None
