"""Variation of training images, inside jit, on images that already lie on the device as bytes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8


def random_crop(key: Key[Array, ""], images: UInt8[Array, "n h w c"], *, padding: int) -> UInt8[Array, "n h w c"]:
    """Each image moved by its own whole number of pixels, at most `padding` along each axis; zeros move in.

    Equals padding by `padding` pixels of zero and cropping back to the size at a random place.
    """
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: Key[Array, ""], images: UInt8[Array, "n h w c"]) -> UInt8[Array, "n h w c"]:
    """Each image mirrored left to right, or not, with equal chance."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1, :], images)


def mixup(
    key: Key[Array, ""], x: Float[Array, "n h w c"], targets: Float[Array, "n classes"], *, mixup_alpha: float
) -> tuple[Float[Array, "n h w c"], Float[Array, "n classes"]]:
    """Each image and its target mixed with another's of the batch (Zhang et al., 2018).

    x_i <- s x_i + (1 - s) x_p(i), targets alike, p a random permutation, s one draw for the batch from
    Beta(mixup_alpha, mixup_alpha); the larger of s and 1 - s goes to the image itself.
    """
    share_key, order_key = jax.random.split(key)
    share = jax.random.beta(share_key, mixup_alpha, mixup_alpha)
    share = jnp.maximum(share, 1 - share)
    order = jax.random.permutation(order_key, len(x))
    mixed_x, mixed_targets = (share * values + (1 - share) * values[order] for values in (x, targets))
    return mixed_x, mixed_targets
