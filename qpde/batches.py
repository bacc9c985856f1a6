"""Inputs as people have them: one reader for every function that takes a batch, or a set of batches.

A batch is images (N, H, W, C) or a `jraph.GraphsTuple`, alone or in a pair with labels. Networks that are not ours take
other arrays too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jraph
import numpy as np

__all__ = ["Batch", "read_batch", "read_batches", "size_of"]

Batch = Any


def read_batches(batches: Iterable[Batch], variables: Mapping[str, Any]) -> Iterator[tuple[Any, np.ndarray | None]]:
    """Read a set of inputs: the one way in which all functions of this library take batches.

    Args:
      batches: images or graphs, alone or in pairs with labels.
      variables: of the network that they are for, which tell the number of channels.
    Yields:
      Images or graph, and labels or None, of one batch after the other.
    Raises:
      ValueError: something else than a set of batches, a batch of another form, without inputs, or of images whose last
        axis are not the network's channels.
    """
    if isinstance(batches, Mapping | jraph.GraphsTuple) or hasattr(batches, "ndim"):
        raise ValueError(f"`batches` is one {_name(batches)}: give a list of batches, such as [x] or [(x, labels)]")
    channels = _channels(variables)
    for index, batch in enumerate(batches):
        x, labels = _split(batch, f"batch {index}", channels)
        if size_of(x) == 0:
            raise ValueError(f"batch {index} holds no images")
        yield x, None if labels is None else np.asarray(labels)


def read_batch(batch: Batch, variables: Mapping[str, Any]) -> Any:
    """The inputs of one batch, for a function that takes no more and no labels.

    Args:
      batch: Images or a graph, alone or in a pair with labels. It may hold no images.
      variables: Collections of the network that it is for.
    Raises:
      ValueError: Something else than a batch, or images whose last axis are not the network's channels.
    """
    return _split(batch, "the batch", _channels(variables))[0]


def _split(batch, name, channels):
    """Images or graph, and labels or None, of the batch that messages call so."""
    expected = "give images (N, H, W, C) or a jraph.GraphsTuple, alone or as a pair (x, labels)"
    if isinstance(batch, Mapping):
        keys = ", ".join(map(repr, batch))
        raise ValueError(f"{name} is a dictionary of {keys}: {expected}, such as (batch['image'], batch['label'])")
    x, labels = batch, None
    if isinstance(batch, tuple | list) and not isinstance(batch, jraph.GraphsTuple):
        if len(batch) != 2:
            raise ValueError(f"{name} is a {type(batch).__name__} of {len(batch)}: {expected}")
        x, labels = batch
    if not isinstance(x, jraph.GraphsTuple):
        if not getattr(x, "ndim", 0):
            raise ValueError(f"the inputs of {name} are of type {type(x).__name__}: {expected}")
        if channels is not None and (x.ndim != 4 or x.shape[3] != channels):
            is_nchw = x.ndim == 4 and x.shape[1] == channels
            hint = "; put the channels last, by x.transpose(0, 2, 3, 1)" if is_nchw else ""
            raise ValueError(
                f"{name} is of shape {tuple(x.shape)}, the network takes images (N, H, W, {channels}){hint}"
            )
    return x, labels


def _channels(variables):
    """Of the images that a network of this library takes, or None where its variables do not tell."""
    stem = variables.get("params", {}).get("stem", {})
    is_image_network = isinstance(stem, Mapping) and set(stem) == {"kernel", "norm"}
    return stem["kernel"].shape[2] if is_image_network else None


def _name(batch):
    return f"array of shape {tuple(batch.shape)}" if hasattr(batch, "ndim") else type(batch).__name__


def size_of(x: Any) -> int:
    """The number of inputs.

    Args:
      x: Images (N, ...), or a graph, whose nodes count.
    """
    return x.nodes.shape[0] if isinstance(x, jraph.GraphsTuple) else len(x)
