"""Variation of images with their label maps: both move alike, and what lies outside has no label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpde.datasets import IGNORED
from train.data.joint import random_colour, random_part, vary_pairs

MEAN = np.array([0.2, 0.4, 0.6], np.float32)


def pairs(n=6, size=(24, 32)):
    """Images whose first channel is 20 times the label, in blocks of 8 pixels."""
    labels = np.random.default_rng(0).integers(0, 10, (n, size[0] // 8, size[1] // 8)).repeat(8, 1).repeat(8, 2)
    images = np.stack([20 * labels, np.full_like(labels, 7), 255 - 20 * labels], axis=-1).astype(np.uint8)
    return jnp.asarray(images), jnp.asarray(labels.astype(np.int8))


def inner(labels):
    """Pixels whose neighbours, two pixels wide, all have their label."""
    same = np.ones(labels.shape, bool)
    for axis in (1, 2):
        for shift in (-2, -1, 1, 2):
            same &= np.roll(labels, shift, axis) == labels
    same[:, :2], same[:, -2:], same[:, :, :2], same[:, :, -2:] = False, False, False, False
    return same


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.2, 2.0), (0.4, 0.8)])
@pytest.mark.parametrize("crop", [None, (16, 40)])
def test_image_and_labels_move_alike(scales, crop):
    images, labels = pairs()
    x, moved = jax.jit(
        lambda key: vary_pairs(key, images, labels, mean=MEAN, crop=crop, scales=scales, flip=True, colour=0.0)
    )(jax.random.key(0))
    size = crop or (24, 32)
    assert (x.shape, moved.shape, moved.dtype) == ((6, *size, 3), (6, *size), jnp.int8)
    counted = (np.asarray(moved) != IGNORED) & inner(np.asarray(moved))
    assert counted.sum() > 50
    np.testing.assert_allclose(np.asarray(x)[..., 0][counted], 20.0 * np.asarray(moved)[counted], atol=1e-3)
    outside = np.asarray(moved) == IGNORED
    np.testing.assert_allclose(np.asarray(x)[outside], np.broadcast_to(255 * MEAN, (outside.sum(), 3)), rtol=1e-6)
    assert outside.any() == (scales[0] < 1 or crop is not None)


def test_at_scale_one_without_crop_and_flip_nothing_changes():
    images, labels = pairs()
    x, same = vary_pairs(
        jax.random.key(1), images, labels, mean=MEAN, crop=None, scales=(1.0, 1.0), flip=False, colour=0.0
    )
    np.testing.assert_allclose(x, images.astype(jnp.float32), atol=1e-3)
    np.testing.assert_array_equal(same, labels)


def test_parts_are_at_many_places_and_halves_are_mirrored():
    ramp = jnp.broadcast_to(jnp.arange(40.0)[None, None, :, None], (64, 32, 40, 3))
    labels = jnp.zeros((64, 32, 40), jnp.int8)
    options = {"outside": jnp.zeros(3), "size": (32, 32), "scales": (1.0, 1.0)}
    part, _ = random_part(jax.random.key(0), ramp, labels, **options)
    first = np.asarray(part[:, 0, 0, 0])
    assert first.min() < 2
    assert first.max() > 6
    np.testing.assert_allclose(np.diff(part[:, 5, :, 0], axis=1), 1, atol=1e-3)
    x, _ = vary_pairs(
        jax.random.key(2),
        ramp.astype(jnp.uint8),
        labels,
        mean=MEAN,
        crop=(32, 32),
        scales=(1.0, 1.0),
        flip=True,
        colour=0.0,
    )
    mirrored = np.asarray(x[:, 5, 1, 0] < x[:, 5, 0, 0])
    assert 0.3 < mirrored.mean() < 0.7


def test_colour_changes_by_the_share_that_is_given():
    grey = jnp.full((200, 4, 4, 3), 100.0)
    changed = np.asarray(random_colour(jax.random.key(0), grey, amount=0.2))
    assert 79.9 < changed.min() < 85
    assert 115 < changed.max() < 120.1
    np.testing.assert_allclose(changed, changed[:, :1, :1, :1] * np.ones((1, 4, 4, 3)), rtol=1e-5)
