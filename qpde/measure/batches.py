"""Sets of inputs that are read batch by batch, and means over them: labels, padding, sums in float64.

A batch is images (N, H, W, C) float32 or a `jraph.GraphsTuple`, alone or in a pair with integer labels: one for each
image in 0 .. classes - 1; or one for each node, or for each pixel of a segmentation network's logits, -1 where it does
not count. Without labels every node counts, those too with which jraph pads a graph, which cannot be told from others:
label them -1.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from qpde.datasets.containers import IGNORED

__all__ = ["Batch", "mean_over", "read_batches"]

Batch = Any

Measured = tuple[dict[str, Any], int]


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
        yield _split(batch, index, channels)


def mean_over(
    batches: Iterable[Batch], variables: Mapping[str, Any], measure: Callable[[Any, int], Measured]
) -> tuple[int, dict[str, Any]]:
    """Means of what two networks are measured by, over all inputs.

    A shorter batch is padded to the longest so far, so that one compiled program serves it too; what was padded is not
    counted, and neither is a node or a pixel without a label.

    Args:
      batches: read once.
      variables: of the network.
      measure: (x, index of the batch) -> numbers by name, (N, ...) each, and the number of classes. Two of them,
        "prediction" and "prediction_q", are the classes that the networks choose, (N,), or (N, H, W) pixel by pixel,
        with one axis more where there are several pairs of networks.
    Returns:
      The number of inputs, and the mean of each of these numbers: "agreement" of the predictions in place of them, and
      "accuracy" of prediction_q and "accuracy_twin" of prediction, which are None where there are no labels.
    Raises:
      ValueError: an empty set, labels on some batches only, of the wrong number or out of range.
    """
    samples, longest, labelled, choices = 0, 0, None, 0
    sums: dict[str, Any] = {}
    for index, (x, labels) in enumerate(read_batches(batches, variables)):
        if labelled is None:
            labelled = labels is not None
        if labelled != (labels is not None):
            raise ValueError(f"batch {index} has {'no ' if labelled else ''}labels, unlike those before it")
        is_graph = isinstance(x, jraph.GraphsTuple)
        count = _size(x)
        longest = max(longest, count)
        found, classes = measure(x if is_graph else _pad(x, longest), index)
        measured = {name: values[:count] for name, values in jax.device_get(found).items()}
        prediction, prediction_q = measured.pop("prediction"), measured.pop("prediction_q")
        of_pixels = prediction.ndim >= 3
        shape = prediction.shape[: 3 if of_pixels else 1]
        prediction, prediction_q = (p.reshape(-1, *p.shape[len(shape) :]) for p in (prediction, prediction_q))
        chosen = {"agreement": prediction == prediction_q}
        if labels is not None:
            has_gaps = is_graph or of_pixels
            _check_labels(labels, shape, smallest=IGNORED if has_gaps else 0, classes=classes, index=index)
            labels = labels.reshape(-1, *[1] * (prediction.ndim - 1))
            chosen |= {"accuracy": prediction_q == labels, "accuracy_twin": prediction == labels}
            if has_gaps:
                counts = labels.reshape(-1) != IGNORED
                chosen = {name: values[counts] for name, values in chosen.items()}
            if is_graph:
                measured = {name: values[counts] for name, values in measured.items()}
                count = counts.sum()
        samples += int(count)
        choices += len(chosen["agreement"])
        for name, values in (measured | chosen).items():
            sums[name] = sums.get(name, 0.0) + values.sum(axis=0, dtype=np.float64)
    if choices == 0:
        raise ValueError("`batches` is empty, or no label counts: there is nothing to compare")
    means = {k: np.asarray(v / (choices if k in chosen else samples)) for k, v in sums.items()}
    return samples, {"accuracy": None, "accuracy_twin": None} | means


def _split(batch, index, channels):
    """Images or graph, and labels or None, of the batch of that index."""
    expected = "give images (N, H, W, C) or a jraph.GraphsTuple, alone or as a pair (x, labels)"
    if isinstance(batch, Mapping):
        keys = ", ".join(map(repr, batch))
        raise ValueError(
            f"batch {index} is a dictionary of {keys}: {expected}, such as (batch['image'], batch['label'])"
        )
    x, labels = batch, None
    if isinstance(batch, tuple | list) and not isinstance(batch, jraph.GraphsTuple):
        if len(batch) != 2:
            raise ValueError(f"batch {index} is a {type(batch).__name__} of {len(batch)}: {expected}")
        x, labels = batch
    if not isinstance(x, jraph.GraphsTuple):
        if not getattr(x, "ndim", 0):
            raise ValueError(f"the inputs of batch {index} are of type {type(x).__name__}: {expected}")
        if channels is not None and (x.ndim != 4 or x.shape[3] != channels):
            is_nchw = x.ndim == 4 and x.shape[1] == channels
            hint = "; put the channels last, by x.transpose(0, 2, 3, 1)" if is_nchw else ""
            raise ValueError(
                f"batch {index} is of shape {tuple(x.shape)}, the network takes images (N, H, W, {channels}){hint}"
            )
    if _size(x) == 0:
        raise ValueError(f"batch {index} holds no images")
    return x, None if labels is None else np.asarray(labels)


def _channels(variables):
    """Of the images that a network of this library takes, or None where its variables do not tell."""
    stem = variables.get("params", {}).get("stem", {})
    is_image_network = isinstance(stem, Mapping) and set(stem) == {"kernel", "norm"}
    return stem["kernel"].shape[2] if is_image_network else None


def _name(batch):
    return f"array of shape {tuple(batch.shape)}" if hasattr(batch, "ndim") else type(batch).__name__


def _size(x):
    """The number of images, or of nodes."""
    return x.nodes.shape[0] if isinstance(x, jraph.GraphsTuple) else len(x)


def _pad(images, length):
    """The last image repeated up to the length: finite wherever the images are."""
    missing = length - len(images)
    if missing == 0:
        return jnp.asarray(images)
    return jnp.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1), mode="edge")


def _check_labels(labels, shape, *, smallest, classes, index):
    if labels.shape != shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels of batch {index} are {labels.dtype} of shape {labels.shape}; they must be integers, "
            f"one for each of its {shape[0]} images or nodes, or for each pixel of the logits: shape {shape}"
        )
    if labels.min() < smallest or labels.max() >= classes:
        raise ValueError(
            f"labels of batch {index} run from {labels.min()} to {labels.max()}; "
            f"they must lie in {smallest} to {classes - 1}, the network's classes"
        )
