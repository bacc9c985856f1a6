"""Your own graph as one .npz file, in the names of `torch_geometric.data.Data`."""

import zipfile
import zlib
from os import PathLike
from pathlib import Path

import numpy as np

from qpde.datasets.containers import NodeGraph

__all__ = ["load_node_graph"]

_PARTS = {"train": "train_mask", "validation": "val_mask", "test": "test_mask"}
_NAMES = ("x", "y", "edge_index", "edge_weight", "classes", *_PARTS, *_PARTS.values())


def load_node_graph(path: str | PathLike[str], *, seed: int = 0) -> NodeGraph:
    """Read a graph from a file that `np.savez` wrote.

    The arrays are those of `NodeGraph.from_arrays`: "x", "y" and "edge_index" are needed; "classes" may be there, and
    "train", "validation" and "test", or "train_mask", "val_mask" and "test_mask".

    Args:
      path: Path of the file.
      seed: Seed of the split, where the file has none.
    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no such file, lacks an array or has an unknown one, or the arrays do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no .npz file of plain arrays: {error}") from None
    missing = [name for name in ("x", "y", "edge_index") if name not in arrays]
    unknown = [name for name in arrays if name not in _NAMES]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which is unknown"
        raise ValueError(f"{path} {what}: the arrays of a graph are {', '.join(_NAMES)}")
    for name, mask in _PARTS.items():
        if mask in arrays:
            if name in arrays:
                raise ValueError(f"{path} holds both {name!r} and {mask!r}: leave one of them out")
            arrays[name] = arrays.pop(mask)
    try:
        return NodeGraph.from_arrays(**arrays, seed=seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
