"""Intersection over union: by hand, and against its definition on random maps."""

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qpde.datasets import IGNORED
from qpde.measure import confusion_matrix, intersection_over_union, mean_iou


def test_counts_and_scores_by_hand():
    labels = np.array([[0, 0, 1], [1, 2, IGNORED]])
    predictions = np.array([[0, 1, 1], [1, 0, 2]])
    found = confusion_matrix(labels, predictions, num_classes=4)
    np.testing.assert_array_equal(found, [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(intersection_over_union(found), [1 / 3, 2 / 3, 0, math.nan])
    assert mean_iou(found) == (1 / 3 + 2 / 3 + 0) / 3
    assert math.isnan(mean_iou(np.zeros((2, 2))))
    several = intersection_over_union(np.stack([found, found.T]))
    np.testing.assert_array_equal(several, [intersection_over_union(own) for own in (found, found.T)])


@given(st.integers(0, 2**16), st.integers(2, 5))
def test_it_is_the_definition_and_ignored_pixels_do_not_matter(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(IGNORED, classes, (3, 40))
    predictions = rng.integers(0, classes, (3, 40))
    other = np.where(labels == IGNORED, rng.integers(0, classes, labels.shape), predictions)
    expected = []
    for k in range(classes):
        counted = labels != IGNORED
        union = counted & ((labels == k) | (predictions == k))
        expected.append((counted & (labels == k) & (predictions == k)).sum() / union.sum() if union.any() else math.nan)
    for predicted in (predictions, jnp.asarray(other)):
        found = intersection_over_union(confusion_matrix(labels, predicted, num_classes=classes))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
