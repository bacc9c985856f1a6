"""Cora, Citeseer and Pubmed (Sen et al., 2008) in the files of Planetoid (Yang, Cohen and Salakhutdinov, 2016).

The files are Python 2 pickles, and a pickle can run any code when it is read. Here it cannot: the few names that these
files need stand for the inert classes at the end of this module, every other name is refused, and no constructor of
NumPy or SciPy sees data that has not been checked.
"""

import pickle
from collections import defaultdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qpde.datasets.containers import NodeGraph, SparseRows, find_folder, random_split

NAMES = ("cora", "citeseer", "pubmed")
VALIDATION_NODES = 500  # Planetoid's protocol: the nodes right after the training nodes
_SOURCE = "qpde.datasets.download_planetoid(name, root), or https://github.com/kimiyoung/planetoid (data/)"


def load_planetoid(
    name: str,
    root: str | PathLike[str],
    *,
    split: str = "public",
    seed: int = 0,
    normalize_features: bool = True,
) -> NodeGraph:
    """Read a citation graph from the raw files ind.NAME.{y,allx,ally,tx,ty,graph,test.index}.

    Citations are made undirected, duplicates and self-citations dropped. The files do not describe 15 of
    Citeseer's nodes: these keep their citations, have no features and the label -1, and are in no split.

    Args:
      name: "cora", "citeseer" or "pubmed".
      root: the folder with the files, or one that holds them in raw/ or planetoid/raw/.
      split: "public", the published one, 20 training nodes a class; "full", the same validation and test nodes and all
        other labelled ones to train (Chen, Ma and Xiao, 2018); "random", `random_split` with `seed`.
      seed: Seed of the random split.
      normalize_features: divide the features of each node by their sum (a node without features keeps zeros).
    Returns:
      `NodeGraph`, with sparse features.
    Raises:
      FileNotFoundError: a file is missing.
      ValueError: unknown `name` or `split`; a file that is no such pickle, asks for a name outside the list, or does
        not fit the others.
    """
    if name not in NAMES:
        raise ValueError(f"`name` (={name!r}) must be one of {', '.join(NAMES)}")
    if split not in ("public", "full", "random"):
        raise ValueError(f'`split` (={split!r}) must be "public", "full" or "random"')
    folder = find_folder(
        Path(root),
        (".", "raw", "planetoid/raw"),
        f"ind.{name}.*",
        what=f"the citation graph {name}",
        source=_SOURCE,
    )
    path = {part: folder / f"ind.{name}.{part}" for part in ("y", "allx", "ally", "tx", "ty", "graph", "test.index")}
    missing = [file.name for file in path.values() if not file.exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; get it from {_SOURCE}")
    known_rows, test_rows = (_read_matrix(path[part]) for part in ("allx", "tx"))
    known_labels, test_labels = (_read_labels(path[part]) for part in ("ally", "ty"))
    test_nodes = _read_indices(path["test.index"], first=len(known_labels))
    num_train = len(_read_labels(path["y"]))
    _require(path["allx"], known_rows.shape[0] == len(known_labels), f"{len(known_labels)} rows, as ally has")
    _require(path["tx"], test_rows.shape == (len(test_nodes), known_rows.shape[1]), "as many rows as test.index")
    _require(path["ty"], len(test_labels) == len(test_nodes), "as many rows as test.index")

    # The first nodes are those of allx in order; row k of tx is node test_nodes[k]; the nodes between are unknown.
    labels = np.full(test_nodes.max() + 1, -1, np.int32)
    labels[: len(known_labels)] = known_labels
    labels[test_nodes] = test_labels
    features = _stack_rows(known_rows, test_rows, test_nodes, normalize=normalize_features)
    senders, receivers = _read_edges(path["graph"], num_nodes=len(labels))

    validation = np.arange(num_train, num_train + VALIDATION_NODES, dtype=np.int32)
    _require(path["y"], 0 < num_train <= len(known_labels) - VALIDATION_NODES, "fewer rows than ally by 500")
    test = np.sort(test_nodes)
    if split == "full":
        train = np.setdiff1d(np.flatnonzero(labels >= 0), np.concatenate([validation, test])).astype(np.int32)
    else:
        train = np.arange(num_train, dtype=np.int32)
    for part, nodes in (("training", train), ("validation", validation), ("test", test)):
        if (labels[nodes] < 0).any():
            raise ValueError(f"{name}: {part} node {nodes[np.argmin(labels[nodes])]} has no label")
    graph = NodeGraph(
        senders=senders,
        receivers=receivers,
        features=features,
        labels=labels,
        train=train,
        validation=validation,
        test=test,
        num_features=known_rows.shape[1],
        num_classes=int(labels.max()) + 1,
    )
    return random_split(graph, seed=seed) if split == "random" else graph


def _stack_rows(known: "_Csr", test: "_Csr", test_nodes: np.ndarray, *, normalize: bool) -> SparseRows:
    row = np.concatenate([known.row, test_nodes[test.row]])
    column = np.concatenate([known.column, test.column])
    value = np.concatenate([known.value, test.value])
    order = np.lexsort((column, row))
    row, column, value = row[order], column[order], value[order]
    if normalize:
        sums = np.bincount(row, value)
        value = value / np.where(sums == 0, 1, sums)[row]
    return SparseRows(row.astype(np.int32), column.astype(np.int32), value.astype(np.float32))


def _read_matrix(path: Path) -> "_Csr":
    matrix = _read_pickle(path)
    _require(path, isinstance(matrix, _Csr) and "row" in vars(matrix), "a sparse matrix")
    return matrix


def _read_labels(path: Path) -> np.ndarray:
    """Classes from one-hot rows; a row of zeros has none: -1."""
    array = _read_pickle(path)
    _require(path, isinstance(array, _Array) and "value" in vars(array), "an array")
    hot = array.value
    _require(path, hot.ndim == 2 and hot.size > 0, "a matrix")
    _require(path, np.isin(hot, (0, 1)).all() and (hot.sum(1) <= 1).all(), "one class in each row")
    return np.where(hot.sum(1) == 0, -1, hot.argmax(1)).astype(np.int32)


def _read_indices(path: Path, *, first: int) -> np.ndarray:
    try:
        nodes = np.array([int(line) for line in path.read_text().split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected one node number a line, {error}") from error
    _require(path, len(nodes) > 0 and nodes.min() >= first, f"nodes from {first} (the rows of ally) on")
    # A gap is a node that is nowhere described; more gaps than nodes is no graph but a damaged file.
    _require(path, nodes.max() < first + 2 * len(nodes), f"nodes below {first + 2 * len(nodes)}")
    _require(path, len(np.unique(nodes)) == len(nodes), "each node once")
    return nodes.astype(np.int32)


def _read_edges(path: Path, *, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    neighbours = _read_pickle(path)
    _require(
        path,
        isinstance(neighbours, dict) and all(isinstance(nodes, list) for nodes in neighbours.values()),
        "a dictionary of lists of neighbours",
    )
    pairs = [(node, other) for node, others in neighbours.items() for other in others]
    _require(path, all(type(node) is int for pair in pairs for node in pair), "integers as nodes")
    _require(path, len(pairs) > 0, "at least one edge")
    for pair in pairs:
        if not (0 <= pair[0] < num_nodes and 0 <= pair[1] < num_nodes):
            raise ValueError(f"{path}: edge {pair} points outside the {num_nodes} nodes")
    edges = np.sort(np.array(pairs, np.int32), axis=1)
    edges = np.unique(edges[edges[:, 0] < edges[:, 1]], axis=0)
    return edges[:, 0], edges[:, 1]


def _require(path: Path, holds: bool | np.bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{path}: expected {expected}; the file is damaged or belongs to another set")


# ---- reading a pickle without running it -----------------------------------------------------------------------


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            # Python 2 wrote the arrays' bytes as text of one byte a character.
            return _Unpickler(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle can fail in any way
            raise ValueError(f"{path} is not a Planetoid file: {error}") from error


class _DType:
    """Stands for numpy.dtype: a plain number type, nothing else."""

    def __init__(self, code: str, *_: Any):
        if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"):
            raise ValueError(f"numbers of type {code!r} are not admitted")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _version, order, *_fields = state  # a type with fields has another code
        if order not in ("<", ">", "|"):
            raise ValueError(f"the byte order {order!r} is not admitted")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Stands for numpy.ndarray: filled from bytes once its type and size are known to agree."""

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(data, dtype.value) if data else np.empty(0, dtype.value)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C")


class _Csr:
    """Stands for scipy.sparse.csr_matrix and csr_array: filled once its parts are known to fit together."""

    def __setstate__(self, state: dict) -> None:
        rows, columns = self.shape = state["_shape"]
        starts, self.column, self.value = (state[key].value for key in ("indptr", "indices", "data"))
        fits = (
            type(rows) is int and type(columns) is int
            and starts.dtype.kind == self.column.dtype.kind == "i"
            and starts.shape == (rows + 1,) and starts[0] == 0 and starts[-1] == len(self.value)
            and (np.diff(starts) >= 0).all()
            and self.column.shape == self.value.shape == (len(self.value),)
            and ((self.column >= 0) & (self.column < columns)).all()
        )  # fmt: skip
        if not fits:
            raise ValueError("the parts of the sparse matrix do not fit together")
        if not np.isfinite(self.value).all():
            raise ValueError("a feature is not finite")
        self.row = np.repeat(np.arange(rows), np.diff(starts))
        if len(np.unique(self.row * columns + self.column)) < len(self.value):
            raise ValueError("a feature is given twice")


def _reconstruct(subtype: type, _shape: Any, _code: Any) -> _Array:
    if subtype is not _Array:
        raise ValueError("only plain arrays are admitted")
    return _Array()


def _reconstructor(subtype: type, base: type, state: Any) -> _Csr:
    """How the protocols 0 and 1 make an object, before its state is set."""
    if subtype is not _Csr or base is not object or state is not None:
        raise ValueError("only sparse matrices are admitted")
    return _Csr()


def _frombuffer(data: Any, dtype: _DType, shape: Any, order: str, axis_order: Any = None) -> _Array:
    """How protocol 5 makes an array."""
    if not isinstance(data, bytes | bytearray) or order not in ("C", "F") or axis_order is not None:
        raise ValueError("only arrays of bytes in C or Fortran order are admitted")
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _scalar(dtype: _DType, data: Any) -> int:
    """A NumPy integer, as Python's."""
    data = data.encode("latin1") if isinstance(data, str) else data
    if dtype.value.kind not in "iu" or len(data) != dtype.value.itemsize:
        raise ValueError("only whole numbers are admitted")
    return int(np.frombuffer(data, dtype.value)[0])


def _encode(text: str, codec: str) -> bytes:
    """How the protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("only bytes written as latin1 are admitted")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How the protocols 0 to 2 write no bytes at all."""
    return b""


# Python 2's names, which these files use, and those that a copy saved again by a present Python has, in any protocol.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "defaultdict"): defaultdict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{(module, "list"): list for module in ("__builtin__", "builtins")},
    **{(module, "object"): object for module in ("__builtin__", "builtins")},
    **{(module, "bytes"): _no_bytes for module in ("__builtin__", "builtins")},
    **{(module, "_reconstructor"): _reconstructor for module in ("copy_reg", "copyreg")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    **{(f"scipy.sparse.{csr}", name): _Csr for csr in ("csr", "_csr") for name in ("csr_matrix", "csr_array")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted") from None
