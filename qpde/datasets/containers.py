"""The shapes in which data is handed over, and the deterministic ways to split it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import jraph
import numpy as np
from jax.experimental.sparse import BCOO
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int32, Integer, UInt8

from qpde.graphs import from_edges


class Split(NamedTuple):
    """Images with their labels: a pytree, so `jax.device_put(split)` keeps it on the device.

    images: uint8 (N, H, W, C), as stored: a quarter of the memory of float32. `Images.normalize` belongs inside jit.
    labels: int32 (N,), one class per image, or int8 (N, H, W), one class per pixel, `IGNORED` where it does not count.
    """

    images: UInt8[np.ndarray, "images height width channels"]
    labels: Integer[np.ndarray, "images *map"]


@dataclass(frozen=True)
class Images:
    """A set of images in three disjoint splits.

    classes: their names; label k is classes[k].
    mean, std: of the training split, per channel, on the scale where a full pixel is 1.
    ignored_label: a label that counts neither in losses nor in metrics, if there is one.
    centre: share of a picture's short side that evaluation looks at, see `qpde.pictures.centre_crop`.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: Float32[np.ndarray, " channels"]
    std: Float32[np.ndarray, " channels"]
    ignored_label: int | None = None
    centre: float = 1.0

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def normalize(
        self, images: UInt8[ArrayLike, "*batch channels"] | Float[ArrayLike, "*batch channels"]
    ) -> Float[Array, "*batch channels"]:
        """What the networks take: (x / 255 - mean) / std in float32, on the device, in or out of jit. x is 0 to 255."""
        scale, shift = 1 / (255 * self.std), self.mean / self.std
        ones = (1,) * (jnp.ndim(images) - 1)
        return jnp.asarray(images, jnp.float32) * scale.reshape(*ones, -1) - shift.reshape(*ones, -1)


class SparseRows(NamedTuple):
    """A sparse matrix as a pytree of its entries, sorted by row, then column; its shape is kept by the owner.

    The product with a dense matrix W is a sorted segment sum of value[:, None] * W[column] over row.
    """

    row: Int32[np.ndarray, " entries"]
    column: Int32[np.ndarray, " entries"]
    value: Float32[np.ndarray, " entries"]


@dataclass(frozen=True)
class NodeGraph:
    """One undirected graph with features and a label on every node. Your own is made by `from_arrays`, `from_networkx`,
    or read by `qpde.datasets.load_node_graph`.

    senders, receivers: each edge once with sender < receiver, sorted; no self-loops.
    features: sparse (nodes, num_features).
    labels: class of each node, -1 where it is unknown.
    train, validation, test: disjoint sorted node indices, all labelled; ValueError for one that is not.
    classes: their names; None stands for their numbers.
    """

    senders: Int32[np.ndarray, " edges"]
    receivers: Int32[np.ndarray, " edges"]
    features: SparseRows
    labels: Int32[np.ndarray, " nodes"]
    train: Int32[np.ndarray, " train"]
    validation: Int32[np.ndarray, " validation"]
    test: Int32[np.ndarray, " test"]
    num_features: int
    num_classes: int
    classes: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"`classes` names {len(self.classes)} classes of {self.num_classes}")
        for part in ("train", "validation", "test"):
            nodes = getattr(self, part)
            unknown = nodes[(self.labels[nodes] < 0) | (self.labels[nodes] >= self.num_classes)]
            if unknown.size:
                raise ValueError(
                    f"{part} node {unknown[0]} has the label {self.labels[unknown[0]]}; "
                    f"labels inside the splits must lie in 0 to {self.num_classes - 1}"
                )

    @classmethod
    def from_arrays(
        cls,
        x: np.ndarray,
        y: np.ndarray,
        edge_index: np.ndarray,
        *,
        train: np.ndarray | Sequence[int] | None = None,
        validation: np.ndarray | Sequence[int] | None = None,
        test: np.ndarray | Sequence[int] | None = None,
        classes: Sequence[str] | np.ndarray | None = None,
        edge_weight: np.ndarray | None = None,
        seed: int = 0,
    ) -> "NodeGraph":
        """Your own graph.

        Its operators are those of undirected graphs without weights. So an edge that is given in one direction counts
        in both, duplicates count once, self-loops are dropped, and nodes without edges are allowed.

        Args:
          x: Features (nodes, F), finite numbers.
          y: Class of each node (nodes,), whole numbers from 0 on, -1 where it is unknown.
          edge_index: Both ends of each edge: whole numbers (2, edges), or a list of edges (edges, 2).
          train: Training nodes, a mask (nodes,) of booleans or their indices.
          validation: Validation nodes, likewise.
          test: Test nodes, likewise. None of the three: 60, 20 and 20% of the labelled nodes, stratified by class.
          classes: Names of the classes.
          edge_weight: Weights (edges,) that a file came with. They must all be 1.
          seed: Seed of the split that is drawn.
        Raises:
          ValueError: Arrays that do not fit together, an end outside the nodes, features that are not finite, weights,
            one or two parts of three, parts that overlap, or a node without a label in one of them.
        """
        x, y, ends = np.asarray(x), np.asarray(y), np.asarray(edge_index)
        if x.ndim != 2 or not np.issubdtype(x.dtype, np.number) or np.iscomplexobj(x) or not np.isfinite(x).all():
            raise ValueError(f"`x` must be finite numbers (nodes, features); got {x.dtype} of shape {x.shape}")
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or not len(y) or y.min() < -1:
            raise ValueError(
                f"`y` must be whole numbers from 0 on, -1 for unknown, one for each of the {len(x)} nodes; got "
                f"{y.dtype} of shape {y.shape}: np.unique(names, return_inverse=True)[1] makes numbers of names"
            )
        if ends.ndim != 2 or 2 not in ends.shape or not np.issubdtype(ends.dtype, np.integer):
            raise ValueError(
                f"`edge_index` must be whole numbers (2, edges) or (edges, 2); got {ends.dtype} {ends.shape}"
            )
        if edge_weight is not None and (np.asarray(edge_weight) != 1).any():
            raise ValueError(
                "the operators of qpde.graphs know edges, not weights: choose the edges that count, such as "
                "edge_index[:, weight > 0.5], and leave the weights out"
            )
        first, second = ends if len(ends) == 2 else ends.T
        graph = from_edges(first, second, num_nodes=len(x))
        num_classes = int(y.max()) + 1 if classes is None else len(classes)
        y = y.astype(np.int32)
        given = {"train": train, "validation": validation, "test": test}
        missing = [name for name, part in given.items() if part is None]
        if 0 < len(missing) < 3:
            raise ValueError("give `train`, `validation` and `test`, or none of them, for a split that is drawn")
        parts = _drawn(y, seed) if missing else [_nodes(name, part, len(y)) for name, part in given.items()]
        if len(np.unique(np.concatenate(parts))) < sum(map(len, parts)):
            raise ValueError("`train`, `validation` and `test` must not share a node")
        row, column = np.nonzero(x)
        return cls(
            senders=np.asarray(graph.senders),
            receivers=np.asarray(graph.receivers),
            features=SparseRows(row.astype(np.int32), column.astype(np.int32), x[row, column].astype(np.float32)),
            labels=y,
            train=parts[0],
            validation=parts[1],
            test=parts[2],
            num_features=x.shape[1],
            num_classes=num_classes,
            classes=None if classes is None else tuple(map(str, classes)),
        )

    @classmethod
    def from_networkx(
        cls, graph: Any, *, features: str = "x", label: str = "y", split: str = "split", seed: int = 0
    ) -> "NodeGraph":
        """A graph of networkx, directed or not, whose nodes carry attributes.

        Args:
          graph: A `networkx` graph. Nodes are numbered in its order. Weights of edges are not looked at.
          features: Attribute with a node's features, a number or a sequence of numbers.
          label: Attribute with its class, of any kind that can be sorted. A node without one is unknown.
          split: Attribute that says "train", "validation" or "test". No node has it: see `from_arrays`.
          seed: Seed of the split that is drawn.
        Raises:
          ValueError: A node without features, no node with a label, or as `from_arrays`.
        """
        number = {node: i for i, node in enumerate(graph.nodes)}
        rows = dict(graph.nodes(data=features))
        if missing := [node for node, row in rows.items() if row is None]:
            raise ValueError(f"node {missing[0]!r} has no attribute {features!r}: every node needs features")
        labels = dict(graph.nodes(data=label))
        classes = sorted({name for name in labels.values() if name is not None})
        if not classes:
            raise ValueError(f"no node has an attribute {label!r}, so there is no class to learn")
        index = {name: i for i, name in enumerate(classes)}
        parts = dict(graph.nodes(data=split))
        chosen = {}
        if any(part is not None for part in parts.values()):
            names = ("train", "validation", "test")
            chosen = {name: np.array([part == name for part in parts.values()]) for name in names}
        edges = [(number[a], number[b]) for a, b in graph.edges()]
        return cls.from_arrays(
            np.array([np.atleast_1d(row) for row in rows.values()]),
            np.array([index.get(name, -1) for name in labels.values()]),
            np.array(edges, np.int64).reshape(-1, 2).T,
            classes=[str(name) for name in classes],
            seed=seed,
            **chosen,
        )

    @property
    def num_nodes(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Tells the graph with its split from any other: a digest of all its arrays."""
        digest = hashlib.sha256()
        for array in (
            self.senders,
            self.receivers,
            *self.features,
            self.labels,
            self.train,
            self.validation,
            self.test,
        ):
            digest.update(f"{array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_jraph(self) -> jraph.GraphsTuple:
        """What the networks take: every edge once, `nodes` being the features as a BCOO matrix (nodes, features)."""
        features = self.features
        index = jnp.stack([jnp.asarray(features.row), jnp.asarray(features.column)], axis=1)
        shape = (self.num_nodes, self.num_features)
        nodes = BCOO((jnp.asarray(features.value), index), shape=shape, indices_sorted=True, unique_indices=True)
        return from_edges(self.senders, self.receivers, num_nodes=self.num_nodes, nodes=nodes)

    def dense_features(self) -> Float32[np.ndarray, "nodes features"]:
        """The features as an ordinary matrix; Pubmed's has 40 MB."""
        dense = np.zeros((self.num_nodes, self.num_features), np.float32)
        dense[self.features.row, self.features.column] = self.features.value
        return dense


def random_split(
    graph: NodeGraph, *, seed: int, labels_per_class: int = 20, validation: int = 500, test: int = 1000
) -> NodeGraph:
    """The same graph with other training, validation and test nodes, as in Planetoid's protocol (Yang et al., 2016).

    Args:
      graph: whose labelled nodes are drawn from.
      seed: the same seed gives the same split.
      labels_per_class: training nodes of each class, at least 1.
      validation: validation nodes, drawn from the remaining labelled ones whatever their class.
      test: test nodes, likewise.
    Returns:
      A `NodeGraph` that shares all other arrays with `graph`.
    Raises:
      ValueError: a class or the whole graph has too few labelled nodes.
    """
    if min(labels_per_class, validation, test) < 1:
        raise ValueError(f"sizes must be positive, got {labels_per_class=}, {validation=}, {test=}")
    order = np.random.default_rng(seed).permutation(np.flatnonzero(graph.labels >= 0))
    rank = _rank_in_class(graph.labels[order])
    counts = np.bincount(graph.labels[order], minlength=graph.num_classes)
    if counts.min() < labels_per_class:
        raise ValueError(f"class {counts.argmin()} has {counts.min()} labelled nodes, fewer than {labels_per_class=}")
    train, rest = order[rank < labels_per_class], order[rank >= labels_per_class]
    if len(rest) < validation + test:
        raise ValueError(
            f"{len(rest)} labelled nodes remain after training, fewer than {validation=} and {test=} together"
        )
    parts = train, rest[:validation], rest[validation : validation + test]
    train, held, tested = (np.sort(part).astype(np.int32) for part in parts)
    return replace(graph, train=train, validation=held, test=tested)


def stratified_parts(labels: np.ndarray, sizes: Sequence[int], *, seed: int) -> list[np.ndarray]:
    """Disjoint sorted index sets of the given sizes, each with the classes in the proportions of the whole.

    The items are shuffled, then ordered by their rank within their class relative to the size of the class: all
    classes advance together, so every stretch of that order is balanced up to an item or two a class.
    """
    if sum(sizes) > len(labels) or min(sizes) < 0:
        raise ValueError(f"{len(labels)} items cannot be split into parts of {list(sizes)}")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    classes = labels[shuffled]
    quantile = (_rank_in_class(classes) + 0.5) / np.bincount(classes)[classes]
    order = shuffled[np.argsort(quantile, kind="stable")]
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes))[: len(sizes)]]


def split_parts(
    labels: np.ndarray, parts: dict[str, np.ndarray], *, validation: float, test: float, what: str
) -> dict[str, np.ndarray]:
    """The items of "train", "validation" and "test": the parts that are missing are held out from the training items.

    Args:
      labels: (N,) classes of all items.
      parts: Numbers of the items of each part that is there, "train" at least.
      validation: Share of the training items to validate on, with the classes in proportion.
      test: Share to test on, alike, taken first.
      what: What messages call the set.
    Raises:
      ValueError: A share is none, or a part would be empty.
    """
    found = dict(parts)
    for part, share in (("test", test), ("validation", validation)):
        if not 0 < share < 1:
            raise ValueError(f"`{part}` (={share}) must be a share above 0 and below 1")
        if part not in found:
            whole = found["train"]
            held = max(1, round(share * len(whole)))
            rest, own = stratified_parts(labels[whole], [len(whole) - held, held], seed=0)
            found["train"], found[part] = whole[rest], whole[own]
    if empty := [part for part in ("train", "validation", "test") if not len(found[part])]:
        raise ValueError(f"{what} has {len(labels)} images and none for {empty[0]}: more are needed")
    return {part: found[part] for part in ("train", "validation", "test")}


def channel_statistics(images: UInt8[np.ndarray, "n h w c"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel on the scale where a full pixel is 1, exact, from histograms."""
    levels = np.arange(256) / 255
    histograms = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(images, -1, 0)])
    weights = histograms / histograms.sum(1, keepdims=True)
    mean = weights @ levels
    deviation = np.sqrt(np.sum(weights * (levels[None, :] - mean[:, None]) ** 2, axis=1))
    return mean.astype(np.float32), deviation.astype(np.float32)


def _nodes(name: str, part: Any, count: int) -> np.ndarray:
    """Sorted indices of the nodes of a mask, or of a list of them."""
    part = np.asarray(part)
    if part.dtype == bool and part.shape == (count,):
        part = np.flatnonzero(part)
    if part.ndim != 1 or (len(part) and not np.issubdtype(part.dtype, np.integer)):
        raise ValueError(f"`{name}` must be a mask ({count},) of booleans, or indices; got {part.dtype} {part.shape}")
    if len(part) == 0 or part.min() < 0 or part.max() >= count:
        raise ValueError(f"`{name}` must name nodes in 0 to {count - 1}, at least one")
    return np.unique(part).astype(np.int32)


def _drawn(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Training, validation and test nodes: 60, 20 and 20% of the labelled ones, stratified."""
    known = np.flatnonzero(labels >= 0)
    share = len(known) // 5
    if share == 0:
        raise ValueError(
            f"{len(known)} nodes have a label, too few for training, validation and test nodes: 5 at least"
        )
    sizes = (len(known) - 2 * share, share, share)
    return [known[part].astype(np.int32) for part in stratified_parts(labels[known], sizes, seed=seed)]


def find_folder(root: Path, below: Sequence[str], contains: str, *, what: str, source: str) -> Path:
    """The first of root / below[i] with a file that matches the pattern `contains`."""
    candidates = [root / path for path in below]
    for folder in candidates:
        if any(folder.glob(contains)):
            return folder
    tried = ", ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"{what} not found: no file like {contains} in {tried}; get it from {source}")


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """For each item how many of the same class come before it."""
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return rank
