"""How well the classes of a segmentation network fit the true ones: counts of pixels, and intersection over union."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qpde.batches import IGNORED

__all__ = ["confusion_matrix", "intersection_over_union", "mean_iou", "mean_of_classes"]


def confusion_matrix(
    labels: Int[Array | np.ndarray, "*pixels"], predictions: Int[Array | np.ndarray, "*pixels"], *, num_classes: int
) -> Float[Array, "classes classes"]:
    """Count pixels by their true class (row) and the predicted one (column), inside or outside of jit.

    Args:
      labels: Classes from 0, or `qpde.datasets.IGNORED` where a pixel does not count.
      predictions: Classes from 0.
      num_classes: Number of classes.
    Returns:
      Counts as float32. They are exact up to 16.7 million pixels of a pair of classes: add up more in float64.
    """
    labels, predictions = (jnp.asarray(a, jnp.int32).reshape(-1) for a in (labels, predictions))
    counts = labels != IGNORED
    places = jnp.where(counts, labels, 0) * num_classes + predictions
    found = jnp.bincount(places, weights=counts.astype(jnp.float32), length=num_classes**2)
    return found.reshape(num_classes, num_classes)


def intersection_over_union(
    confusion: Float[Array | np.ndarray, "*networks classes classes"],
) -> Float[np.ndarray, "*networks classes"]:
    """Pixels of a class that are found, over those that are of it or taken for it: one number a class.

    Args:
      confusion: Result of `confusion_matrix`, or a sum of several; with leading axes, several at once.
    Returns:
      Numbers from 0 to 1; NaN for a class that neither labels nor predictions hold.
    """
    confusion = np.asarray(confusion, np.float64)
    found = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-2) + confusion.sum(-1) - found
    return np.divide(found, union, out=np.full(found.shape, np.nan), where=union > 0)


def mean_iou(confusion: Float[Array | np.ndarray, "classes classes"]) -> float:
    """Mean of `intersection_over_union` over the classes that occur; NaN where none does.

    Args:
      confusion: Result of `confusion_matrix`, or a sum of several.
    """
    return float(mean_of_classes(intersection_over_union(confusion)))


def mean_of_classes(iou: Float[np.ndarray, "*networks classes"]) -> Float[np.ndarray, "*networks"]:
    """Mean over the classes that occur; NaN where none does.

    Args:
      iou: Result of `intersection_over_union`.
    """
    occurs = ~np.isnan(iou)
    total, count = np.where(occurs, iou, 0.0).sum(-1), occurs.sum(-1)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
