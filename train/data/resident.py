"""What training asks of a set of images, and the sets that answer by keeping all of them on the device as bytes."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from qpde.datasets import Images, Split
from train.config.images import Data
from train.config.segmentation import SegmentationData
from train.data.augment import mixup, random_crop, random_flip
from train.data.fingerprint import fingerprint_of
from train.data.joint import vary_pairs
from train.data.order import epoch_order, make_select
from train.host.mesh import put, replicated, stacked_sharding
from train.steps.losses import IGNORED
from train.steps.state import TrainState

DATA_DIR_VARIABLE = "QPDE_DATA_DIR"


Vary = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(key, images, labels) -> the network's input and its labels."""


class ImageSet(Protocol):
    """The images of an experiment, in batches of its size, wherever they are.

    Attributes:
      shape: (height, width, channels) of what the network sees.
      num_classes: Number of classes.
      count: training images.
      chance: validation accuracy of guessing the commonest class.
      normalize: bytes -> the network's input, inside jit.
      stored: the set itself, for the names of its classes, mean and std.
      fingerprint: tells it from any other.
      select: (state, *arguments) -> ((images, labels), key): the batch of the step that the state stands at.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def count(self) -> int: ...
    @cached_property
    def chance(self) -> float: ...
    @property
    def normalize(self) -> Callable: ...
    @property
    def stored(self) -> Images: ...
    @cached_property
    def fingerprint(self) -> str: ...
    @property
    def select(self) -> Callable: ...

    def feed(self, mesh: Mesh) -> Callable[[TrainState], Iterable[tuple]]:
        """`batches(state)`: `select`'s arguments, on the devices of the mesh, for the step that the state stands at and
        those that follow, to the end of its epoch."""

    def first_batches(self, *, limit: int) -> Iterator[Split]:
        """The first training batches as they are stored, at most `limit`, all of them full."""

    def in_order(self, part: str) -> Iterator[Split]:
        """The batches of "validation" or "test", the last one smaller."""

    def stacks(self, part: str, mesh: Mesh | None = None) -> Iterable[Split]:
        """The same as stacks of equal batches on a leading axis, the last filled up with label `IGNORED`; can be gone
        through again.  With a mesh, its devices share each batch."""


@dataclasses.dataclass(frozen=True)
class Resident:
    """An `ImageSet` that keeps all images on the device.

    Attributes:
      images: the set.
      batch_size: images a step.
    """

    images: Images
    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.train.images.shape[1:]

    @property
    def num_classes(self) -> int:
        return self.images.num_classes

    @property
    def count(self) -> int:
        return len(self.images.train.labels)

    @cached_property
    def chance(self) -> float:
        labels = self.images.validation.labels
        labels = labels[labels != IGNORED]
        return float(np.bincount(labels).max() / len(labels))

    @property
    def normalize(self) -> Callable:
        return self.images.normalize

    @property
    def stored(self) -> Images:
        return self.images

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of((*self.images.train, *self.images.validation, *self.images.test))

    @property
    def select(self) -> Callable:
        return make_select(steps_per_epoch=self.count // self.batch_size, batch_size=self.batch_size)

    def feed(self, mesh: Mesh) -> Callable[[TrainState], Iterable[tuple]]:
        # Every device holds all images: as bytes they are small where they fit at all, and then the shuffled batch is
        # gathered without asking the other devices.
        train, steps = self.images.train, self.count // self.batch_size
        labels = train.labels.astype(np.int32) if train.labels.ndim == 1 else train.labels  # maps stay small
        everywhere = put((train.images, labels), replicated(mesh))

        def batches(state):
            order = epoch_order(state, count=self.count, steps_per_epoch=steps)
            return [(*everywhere, order)] * (steps - int(state.step) % steps)

        return batches

    def first_batches(self, *, limit: int) -> Iterator[Split]:
        steps = min(limit, self.count // self.batch_size)
        return self._cut(self.images.train, steps * self.batch_size)

    def in_order(self, part: str) -> Iterator[Split]:
        split = getattr(self.images, part)
        return self._cut(split, len(split.labels))

    def stacks(self, part: str, mesh: Mesh | None = None) -> Iterable[Split]:
        return [stack_batches(getattr(self.images, part), self.batch_size, mesh)]

    def _cut(self, split: Split, end: int) -> Iterator[Split]:
        for start in range(0, end, self.batch_size):
            part = slice(start, min(start + self.batch_size, end))
            yield Split(split.images[part], split.labels[part])


def data_root(name: str, data_dir: Path | None) -> Path:
    """`data_dir`, or the environment's; ValueError where the data set of that name has neither."""
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        raise ValueError(f"{name} is read from files: give --data-dir or set {DATA_DIR_VARIABLE}")
    return Path(root)


def own_path(name: str, data_dir: Path | None) -> Path:
    """The path of own data, or of the same name below the root of the data, where they were moved or copied to."""
    path, root = Path(name), data_dir or os.environ.get(DATA_DIR_VARIABLE)
    for place in (path, *([Path(root) / path.name] if root else [])):
        if place.exists():
            return place
    raise FileNotFoundError(f"{path} is not there; if it was moved to FOLDER/{path.name}, give --data-dir FOLDER")


def make_vary(config: Data | SegmentationData, images: ImageSet) -> Vary:
    """`vary(key, images, labels) -> (x, labels)`: the configured variation of each image, then normalisation.

    Args:
      config: What is varied.
      images: The set. Label maps are varied with its images.
    """
    if isinstance(config, SegmentationData):
        return partial(_vary_maps, config, images)

    def vary(key, x, labels):
        crop_key, flip_key = jax.random.split(key)
        if config.crop_padding:
            x = random_crop(crop_key, x, padding=config.crop_padding)
        if config.flip:
            x = random_flip(flip_key, x)
        return images.normalize(x), labels

    return vary


def _vary_maps(config: SegmentationData, images: ImageSet, key: Array, x: Array, labels: Array) -> tuple[Array, Array]:
    x, labels = vary_pairs(
        key,
        x,
        labels,
        mean=jnp.asarray(images.stored.mean),
        crop=config.crop,
        scales=(config.smallest_scale, config.largest_scale),
        flip=config.flip,
        colour=config.colour,
    )
    return images.normalize(x), labels.astype(jnp.int32)


def make_inputs(
    config: Data | SegmentationData, images: ImageSet, teach: Callable[[Array, Array], Array] | None = None
):
    """`inputs(key, images, labels) -> (x, targets, labels)` of a training step, the labels being those of x.

    Targets are distributions over the classes; of label maps, which would be large as such, the labels themselves.

    Args:
      config: What is varied.
      images: The set.
      teach: (x, targets) -> the targets that a teacher makes of them.
    """
    vary = make_vary(config, images)

    # Of several trainings at once one after the other: vmapped, the generator of keys draws other numbers.
    @jax.custom_batching.sequential_vmap
    def inputs(key, x, labels):
        if isinstance(config, SegmentationData):
            x, labels = vary(key, x, labels)
            return x, labels, labels
        targets = jax.nn.one_hot(labels, images.num_classes)
        if config.mixup:
            vary_key, mix_key = jax.random.split(key)
            x, targets = mixup(mix_key, vary(vary_key, x, labels)[0], targets, mixup_alpha=config.mixup)
        else:
            x, _ = vary(key, x, labels)
        return x, targets if teach is None else teach(x, targets), labels

    return inputs


def stack_batches(split: Split, batch_size: int, mesh: Mesh | None = None) -> Split:
    """(images, labels) of a split as batches on a leading axis, the last filled up with label `IGNORED`.

    With a mesh, its devices share each batch.
    """
    count = len(split.labels)
    batches = -(-count // batch_size)
    fill = batches * batch_size - count
    images = np.concatenate([split.images, np.repeat(split.images[:1], fill, axis=0)])
    labels = np.concatenate([split.labels, np.full((fill, *split.labels.shape[1:]), IGNORED)]).astype(np.int32)
    stack = Split(*(part.reshape(batches, batch_size, *part.shape[1:]) for part in (images, labels)))
    return jax.tree.map(jnp.asarray, stack) if mesh is None else put(stack, stacked_sharding(mesh))
