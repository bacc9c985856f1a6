"""Means over a set of inputs that is read batch by batch, see `qpde.batches`: labels, padding, sums in float64.

Labels are integers: one for each image in 0 .. classes - 1; or one for each node, or for each pixel of a segmentation
network's logits, -1 where it does not count. Without labels every node counts, those too with which jraph pads a graph,
which cannot be told from others: label them -1.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from qpde.batches import IGNORED, Batch, read_batches, size_of
from qpde.measure.pixels import intersection_over_union

__all__ = ["mean_over"]

Measured = tuple[dict[str, Any], int]


def mean_over(
    batches: Iterable[Batch], variables: Mapping[str, Any], measure: Callable[[Any, int], Measured]
) -> tuple[int, dict[str, Any]]:
    """Means of what two networks are measured by, over all inputs.

    A shorter batch is padded to the longest so far, so that one compiled program serves it too; what was padded is not
    counted, and neither is a node or a pixel without a label.

    Args:
      batches: read once.
      variables: Variables of the network.
      measure: (x, index of the batch) -> numbers by name, (N, ...) each, and the number of classes. Two of them,
        "prediction" and "prediction_q", are the classes that the networks choose, (N,), or (N, H, W) pixel by pixel,
        with one axis more where there are several pairs of networks.
    Returns:
      The number of inputs, and the mean of each of these numbers: "agreement" of the predictions in place of them, and
      "accuracy" of prediction_q and "accuracy_twin" of prediction, which are None where there are no labels. With maps
      of labels also "iou" and "iou_twin", the intersection over union of every class, (..., classes), else None.
    Raises:
      ValueError: an empty set, labels on some batches only, of the wrong number or out of range.
    """
    samples, longest, labelled, choices = 0, 0, None, 0
    sums: dict[str, Any] = {}
    confusions: dict[str, Any] = {}
    for index, (x, labels) in enumerate(read_batches(batches, variables)):
        if labelled is None:
            labelled = labels is not None
        if labelled != (labels is not None):
            raise ValueError(f"batch {index} has {'no ' if labelled else ''}labels, unlike those before it")
        is_graph = isinstance(x, jraph.GraphsTuple)
        count = size_of(x)
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
            if of_pixels:
                for name, own in (("iou", prediction_q), ("iou_twin", prediction)):
                    found = _confusions(labels[counts], own[counts], classes)
                    confusions[name] = confusions.get(name, 0.0) + found
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
    iou = {name: intersection_over_union(found) for name, found in confusions.items()}
    return samples, dict.fromkeys(("accuracy", "accuracy_twin", "iou", "iou_twin")) | means | iou


def _confusions(labels, predictions, classes):
    """The confusion matrix of every pair of networks, (..., classes, classes)."""
    places = labels * classes + predictions
    columns = places.reshape(len(places), math.prod(places.shape[1:])).T
    counts = [np.bincount(column, minlength=classes**2) for column in columns]
    return np.reshape(counts, (*places.shape[1:], classes, classes)).astype(np.float64)


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
