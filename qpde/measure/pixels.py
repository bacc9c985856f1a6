"""How well the classes of a segmentation network fit the true ones: counts of pixels, and intersection over union."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qpde.batches import IGNORED

__all__ = ["confusion_matrix", "intersection_over_union", "mean_iou"]


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


def intersection_over_union(confusion: Float[Array | np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Pixels of a class that are found, over those that are of it or taken for it: one number a class.

    Args:
      confusion: Result of `confusion_matrix`, or a sum of several.
    Returns:
      Numbers from 0 to 1; NaN for a class that neither labels nor predictions hold.
    """
    confusion = np.asarray(confusion, np.float64)
    found = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - found
    return np.divide(found, union, out=np.full(len(found), np.nan), where=union > 0)


def mean_iou(confusion: Float[Array | np.ndarray, "classes classes"]) -> float:
    """Mean of `intersection_over_union` over the classes that occur; NaN where none does.

    Args:
      confusion: Result of `confusion_matrix`, or a sum of several.
    """
    found = intersection_over_union(confusion)
    present = found[~np.isnan(found)]
    return float(present.mean()) if len(present) else float("nan")
