"""Losses of classes for every pixel, in which some pixels do not count."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qpde.datasets import IGNORED
from train.config.segmentation import SegmentationLoss

_SMALLEST = 1e-6


def make_pixel_entropy(config: SegmentationLoss, weights: Float[np.ndarray, " classes"] | None) -> Callable:
    """`entropy(logits, labels) -> scalar`, for `train.steps.train_step.make_loss`.

    Args:
      config: What it is made of.
      weights: Weights of the classes; None weighs all alike.
    """

    def entropy(logits: Float[Array, "n h w classes"], labels: Int[Array, "n h w"]) -> Float[Array, ""]:
        loss = pixel_cross_entropy(
            logits, labels, weights=weights, smoothing=config.label_smoothing, focal=config.focal
        )
        return loss + config.dice * dice_loss(logits, labels) if config.dice else loss

    return entropy


def pixel_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: Int[Array, "n h w"],
    *,
    weights: Float[np.ndarray, " classes"] | None = None,
    smoothing: float = 0.0,
    focal: float = 0.0,
) -> Float[Array, ""]:
    """Weighted mean of -(1 - p)^focal sum_k t_k log p_k over the pixels that count.

    p is softmax(logits), at the pixel's class in the factor, and t = (1 - smoothing) onehot + smoothing / classes. With
    the weight w of each pixel's class the mean is sum w l / sum w. It is 0 where no pixel counts.

    Args:
      logits: Before the softmax.
      labels: Classes from 0, or `IGNORED`.
      weights: Weights of the classes. Default: 1.
      smoothing: In [0, 1).
      focal: Exponent, 0 or more (Lin et al., 2017).
    """
    counts, chosen = labels != IGNORED, jnp.maximum(labels, 0)
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, chosen[..., None], axis=-1)[..., 0]
    losses = -((1 - smoothing) * own + smoothing * log_p.mean(-1))
    if focal:
        losses = losses * jnp.maximum(-jnp.expm1(own), _SMALLEST) ** focal
    w = counts.astype(jnp.float32)
    if weights is not None:
        w = w * jnp.asarray(weights, jnp.float32)[chosen]
    return jnp.sum(w * losses) / jnp.maximum(jnp.sum(w), _SMALLEST)


def dice_loss(logits: Float[Array, "n h w classes"], labels: Int[Array, "n h w"]) -> Float[Array, ""]:
    """1 - mean over classes of (2 sum p t + 1) / (sum p + sum t + 1), sums over the pixels that count.

    Args:
      logits: Before the softmax, whose result is p.
      labels: Classes from 0, whose one-hot form is t, or `IGNORED`.
    """
    counts = (labels != IGNORED).astype(jnp.float32)[..., None]
    p = counts * jax.nn.softmax(logits)
    t = counts * jax.nn.one_hot(labels, logits.shape[-1])
    axes = (0, 1, 2)
    return 1 - jnp.mean((2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1))


def median_frequency_weights(labels: Int[np.ndarray, "n h w"], num_classes: int) -> Float[np.ndarray, " classes"]:
    """Median of the classes' frequencies over each one's own (Eigen and Fergus, 2015), float32.

    The frequency of a class is its share of the pixels that count in the images where it occurs. A class that occurs
    nowhere has weight 0.
    """
    counts = np.stack([np.bincount(image[image != IGNORED], minlength=num_classes) for image in labels])
    where = counts > 0
    beside = (where * counts.sum(1, keepdims=True)).sum(0)
    frequency = counts.sum(0) / np.maximum(beside, 1)
    found = frequency > 0
    weights = np.zeros(num_classes, np.float32)
    weights[found] = np.median(frequency[found]) / frequency[found]
    return weights
