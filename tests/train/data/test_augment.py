"""Augmentation of images: flips and crops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data.augment import random_crop, random_flip


def _images(seed, n=6, side=8, channels=2):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 256, (n, side, side, channels)), jnp.uint8)


@given(seed=st.integers(0, 1000))
def test_flipping_twice_with_the_same_key_is_the_identity(seed):
    images, key = _images(seed), jax.random.key(seed)
    np.testing.assert_array_equal(random_flip(key, random_flip(key, images)), images)


def test_half_of_the_images_are_flipped():
    images = _images(0, n=2000, side=2, channels=1)
    flipped = np.any(np.asarray(random_flip(jax.random.key(0), images)) != np.asarray(images), axis=(1, 2, 3))
    changeable = np.any(np.asarray(images[:, :, ::-1]) != np.asarray(images), axis=(1, 2, 3))
    assert abs(flipped[changeable].mean() - 0.5) < 4 * 0.5 / math.sqrt(changeable.sum())  # 4 standard deviations


@given(seed=st.integers(0, 1000))
def test_a_crop_moves_each_image_by_at_most_the_padding_and_moves_zeros_in(seed):
    images, padding = _images(seed), 3
    cropped = np.asarray(random_crop(jax.random.key(seed), images, padding=padding))
    for image, crop in zip(np.asarray(images), cropped, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        places = [
            (i, j)
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
            if np.array_equal(padded[i : i + 8, j : j + 8], crop)
        ]
        assert len(places) == 1  # the images have no zeros, so the place is unique


def test_crops_reach_every_place_and_differ_between_images():
    marked = jnp.zeros((2000, 5, 5, 1), jnp.uint8).at[:, 2, 2].set(1)
    cropped = np.asarray(random_crop(jax.random.key(1), marked, padding=2))[..., 0]
    places = {tuple(np.argwhere(image)[0]) for image in cropped}
    assert places == {(i, j) for i in range(5) for j in range(5)}


def test_augmentation_is_determined_by_its_key():
    images = _images(0)
    for vary in (random_flip, lambda key, x: random_crop(key, x, padding=2)):
        once, again = vary(jax.random.key(3), images), vary(jax.random.key(3), images)
        np.testing.assert_array_equal(once, again)
        assert np.any(np.asarray(once) != np.asarray(vary(jax.random.key(4), images)))
