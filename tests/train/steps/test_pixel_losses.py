"""Losses for every pixel: their formulas, and that pixels without a class change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpde.datasets import IGNORED
from train.config.segmentation import SegmentationLoss
from train.steps.losses import classification_sums
from train.steps.pixel_losses import dice_loss, make_pixel_entropy, median_frequency_weights, pixel_cross_entropy

CLASSES = 4


def drawn(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 3, 5, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (2, 3, 5)).astype(np.int32)
    return rng, logits, labels


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@settings(max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 2.0]))
def test_cross_entropy_is_its_formula(seed, smoothing, focal):
    rng, logits, labels = drawn(seed)
    labels[0, 0] = IGNORED
    weights = rng.uniform(0.5, 2, CLASSES).astype(np.float32)
    log_p, total, norm = log_softmax(logits.astype(np.float64)), 0.0, 0.0
    for place in zip(*np.nonzero(labels >= 0), strict=True):
        k = labels[place]
        t = smoothing / CLASSES + (1 - smoothing) * (np.arange(CLASSES) == k)
        factor = (1 - np.exp(log_p[place][k])) ** focal
        total -= weights[k] * factor * (t * log_p[place]).sum()
        norm += weights[k]
    found = pixel_cross_entropy(logits, labels, weights=weights, smoothing=smoothing, focal=focal)
    np.testing.assert_allclose(found, total / norm, rtol=1e-4)


def test_dice_is_nothing_for_a_certain_and_true_prediction():
    _, _, labels = drawn(0)
    certain = 100.0 * jax.nn.one_hot(labels, CLASSES)
    np.testing.assert_allclose(dice_loss(certain, labels), 0, atol=1e-6)
    assert float(dice_loss(-certain, labels)) > 0.8


@pytest.mark.parametrize(
    "config", [SegmentationLoss(), SegmentationLoss(focal=2.0, dice=0.5, label_smoothing=0.1)], ids=["plain", "all"]
)
def test_a_pixel_that_does_not_count_changes_neither_loss_nor_gradient_nor_score(config):
    rng, logits, labels = drawn(1)
    ignored = rng.random(labels.shape) < 0.4
    labels[ignored] = IGNORED
    other = np.where(ignored[..., None], rng.normal(size=logits.shape).astype(np.float32), logits)
    entropy = make_pixel_entropy(config, rng.uniform(0.5, 2, CLASSES).astype(np.float32))
    loss, gradient = jax.value_and_grad(entropy)(jnp.asarray(logits), labels)
    loss_other, gradient_other = jax.value_and_grad(entropy)(jnp.asarray(other), labels)
    np.testing.assert_array_equal(np.asarray(gradient)[ignored], 0)
    np.testing.assert_allclose(loss, loss_other, rtol=1e-6)
    np.testing.assert_allclose(gradient, gradient_other, rtol=1e-5, atol=1e-8)
    scores, scores_other = (classification_sums(z, labels) for z in (jnp.asarray(logits), jnp.asarray(other)))
    assert float(scores["count"]) == (~ignored).sum()
    for name in scores:
        np.testing.assert_allclose(scores[name], scores_other[name], rtol=1e-6)


def test_a_batch_without_a_label_is_no_division_by_zero():
    _, logits, labels = drawn(2)
    entropy = make_pixel_entropy(SegmentationLoss(focal=1.0), None)
    loss, gradient = jax.value_and_grad(entropy)(jnp.asarray(logits), np.full_like(labels, IGNORED))
    assert float(loss) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_median_frequency_weights_by_hand():
    labels = np.array([[[0, 0, 0, 1]], [[0, 0, IGNORED, IGNORED]], [[2, 2, 0, 0]]], np.int8)
    # Class 0: 7 of the 10 pixels that count beside it; class 1: 1 of 4; class 2: 2 of 4; class 3 nowhere.
    np.testing.assert_allclose(median_frequency_weights(labels, 4), [0.5 / 0.7, 2, 1, 0], rtol=1e-6)
