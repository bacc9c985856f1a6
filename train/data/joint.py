"""Variation of training images together with their label maps, inside jit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key, UInt8

from qpde.datasets import IGNORED

__all__ = ["random_colour", "random_part", "vary_pairs"]


def vary_pairs(
    key: Key[Array, ""],
    images: UInt8[Array, "n h w c"],
    labels: Integer[Array, "n h w"],
    *,
    mean: Float[Array, " c"],
    crop: tuple[int, int] | None,
    scales: tuple[float, float],
    flip: bool,
    colour: float,
) -> tuple[Float[Array, "n h_out w_out c"], Integer[Array, "n h_out w_out"]]:
    """Random parts of images, mirrored and coloured at random, with the labels of the same pixels.

    Args:
      key: What all draws follow from.
      images: As they are stored.
      labels: Classes, or `IGNORED`.
      mean: Colour outside of an image, a full pixel being 1.
      crop: Height and width of the parts. Default: of the images.
      scales: Smallest and largest enlargement.
      flip: Whether half of them are mirrored.
      colour: Largest change of brightness, contrast and saturation, as a share.
    Returns:
      Images, a full pixel being 255, and labels.
    """
    part_key, flip_key, colour_key = jax.random.split(key, 3)
    x = images.astype(jnp.float32)
    size = crop or (images.shape[1], images.shape[2])
    x, labels = random_part(part_key, x, labels, outside=255 * mean, size=size, scales=scales)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (len(x),))
        x = jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
        labels = jnp.where(mirrored[:, None, None], labels[:, :, ::-1], labels)
    return random_colour(colour_key, x, amount=colour) if colour else x, labels


def random_part(
    key: Key[Array, ""],
    x: Float[Array, "n h w c"],
    labels: Integer[Array, "n h w"],
    *,
    outside: Float[Array, " c"],
    size: tuple[int, int],
    scales: tuple[float, float],
) -> tuple[Float[Array, "n h_out w_out c"], Integer[Array, "n h_out w_out"]]:
    """A part of each image at a random place, enlarged by a random factor, with the labels of the nearest pixels.

    Where the part is larger than the image, the image lies in it at a random place, with a colour around it and no
    label.

    Args:
      key: What all draws follow from.
      x: Images.
      labels: Classes, or `IGNORED`.
      outside: The colour.
      size: Height and width of the parts.
      scales: Smallest and largest factor; its logarithm is uniform between theirs.
    """
    scale_key, place_key = jax.random.split(key)
    low, high = jnp.log(jnp.asarray(scales, jnp.float32))
    factor = jnp.exp(jax.random.uniform(scale_key, (len(x),), minval=low, maxval=high))
    places = jax.random.uniform(place_key, (len(x), 2))

    def part(x, labels, factor, place):
        rows, columns = (
            _coordinates(own, wanted, factor, share)
            for own, wanted, share in zip(x.shape[:2], size, place, strict=True)
        )
        inside = _inside(rows, x.shape[0])[:, None] & _inside(columns, x.shape[1])[None, :]
        pixels = _interpolated(_interpolated(x, rows, 0), columns, 1)
        nearest = [_nearest(at, n) for at, n in zip((rows, columns), x.shape[:2], strict=True)]
        classes = labels[nearest[0]][:, nearest[1]]
        return (
            jnp.where(inside[..., None], pixels, outside[None, None, :]),
            jnp.where(inside, classes, jnp.asarray(IGNORED, labels.dtype)),
        )

    return jax.vmap(part)(x, labels, factor, places)


def random_colour(key: Key[Array, ""], x: Float[Array, "n h w c"], *, amount: float) -> Float[Array, "n h w c"]:
    """Each image with another brightness, contrast and saturation, a factor of 1 - amount to 1 + amount each.

    Args:
      key: What all draws follow from.
      x: Images, a full pixel being 255; the result is cut off at 0 and 255.
      amount: Largest change, in [0, 1).
    """
    factors = jax.random.uniform(key, (3, len(x), 1, 1, 1), minval=1 - amount, maxval=1 + amount)
    brightness, contrast, saturation = factors
    x = brightness * x
    centre = x.mean((1, 2, 3), keepdims=True)
    x = centre + contrast * (x - centre)
    grey = x.mean(-1, keepdims=True)
    return jnp.clip(grey + saturation * (x - grey), 0, 255)


def _coordinates(own: int, wanted: int, factor: jax.Array, share: jax.Array) -> jax.Array:
    """Where the pixels of a part lie in the image, along one axis."""
    first = share * (own - wanted / factor)
    return first + (jnp.arange(wanted, dtype=jnp.float32) + 0.5) / factor - 0.5


def _inside(at: jax.Array, size: int) -> jax.Array:
    return (at > -0.5) & (at < size - 0.5)


def _nearest(at: jax.Array, size: int) -> jax.Array:
    return jnp.clip(jnp.round(at), 0, size - 1).astype(jnp.int32)


def _interpolated(x: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """x at places between its pixels along an axis."""
    below = jnp.floor(at)
    lower, upper = (jnp.take(x, _nearest(i, x.shape[axis]), axis=axis) for i in (below, below + 1))
    share = (at - below).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return lower + share * (upper - lower)
