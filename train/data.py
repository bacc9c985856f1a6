"""Images for training and evaluation: loaded once, kept on the device as bytes."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

import qpde.datasets
from qpde.datasets import Images, Split
from train.augment import mixup, random_crop, random_flip
from train.config import Data
from train.losses import IGNORED

DATA_DIR_VARIABLE = "QPDE_DATA_DIR"


def load_images(config: Data, data_dir: Path | None) -> Images:
    """The data set as `qpde.datasets` returns it.

    Args:
      config: which one.
      data_dir: root of the data; None takes the environment's QPDE_DATA_DIR.
    Raises:
      ValueError: the data set lies in files and no folder is given.
      FileNotFoundError: the files are not in the folder.
    """
    if config.name == "digits":
        return qpde.datasets.load_digits(size=config.size)
    return qpde.datasets.load_cifar10(data_root(config.name, data_dir))


def data_root(name: str, data_dir: Path | None) -> Path:
    """`data_dir`, or the environment's; ValueError where the data set of that name has neither."""
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        raise ValueError(f"{name} is read from files: give --data-dir or set {DATA_DIR_VARIABLE}")
    return Path(root)


def make_vary(config: Data, images: Images):
    """`vary(key, images) -> x`: the configured variation of each image, then normalisation."""

    def vary(key: Key[Array, ""], x: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        crop_key, flip_key = jax.random.split(key)
        if config.crop_padding:
            x = random_crop(crop_key, x, padding=config.crop_padding)
        if config.flip:
            x = random_flip(flip_key, x)
        return images.normalize(x)

    return vary


def make_prepare(config: Data, images: Images):
    """`prepare(key, images, labels) -> (x, targets)`: input and distributions over the classes of a training step."""
    vary = make_vary(config, images)

    def prepare(
        key: Key[Array, ""], x: UInt8[Array, "n h w c"], labels: Int[Array, " n"]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, "n classes"]]:
        targets = jax.nn.one_hot(labels, images.num_classes)
        if not config.mixup:
            return vary(key, x), targets
        vary_key, mix_key = jax.random.split(key)
        return mixup(mix_key, vary(vary_key, x), targets, strength=config.mixup)

    return prepare


def stack_batches(split: Split, batch_size: int) -> Split:
    """(images, labels) of a split as batches on a leading axis, the last filled up with label `IGNORED`."""
    count = len(split.labels)
    batches = -(-count // batch_size)
    fill = batches * batch_size - count
    images = np.concatenate([split.images, np.repeat(split.images[:1], fill, axis=0)])
    labels = np.concatenate([split.labels, np.full(fill, IGNORED)]).astype(np.int32)
    return Split(
        jnp.asarray(images.reshape(batches, batch_size, *images.shape[1:])),
        jnp.asarray(labels.reshape(batches, batch_size)),
    )


def normalized_batches(
    images: Images, split: Split, *, batch_size: int
) -> Iterator[tuple[Float[Array, "n h w c"], Int[Array, " n"]]]:
    """(network input, labels) of a split in order, the last batch smaller."""
    normalize = jax.jit(images.normalize)
    count = len(split.labels)
    for start in range(0, count, batch_size):
        part = slice(start, min(start + batch_size, count))
        yield normalize(split.images[part]), jnp.asarray(split.labels[part], jnp.int32)
