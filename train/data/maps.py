"""Images with label maps, kept on the device as bytes, and what training makes of them."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from qpde.datasets import IGNORED, Images, Split, load_camvid, load_cityscapes, load_label_maps
from qpde.datasets.cityscapes import CLASSES, classes_of_ids, split_train
from qpde.datasets.label_maps import as_images
from train.config.segmentation import SegmentationData, folder_of
from train.data.joint import vary_pairs
from train.data.resident import Resident, data_root
from train.data.tfds_records import PREFIX, find_builder
from train.steps.pixel_losses import median_frequency_weights


@dataclasses.dataclass(frozen=True)
class Maps(Resident):
    """A `train.data.resident.ImageSet` whose labels are maps.

    Attributes:
      images: The set.
      batch_size: Images a step.
      config: How training varies them.
    """

    config: SegmentationData = dataclasses.field(default_factory=SegmentationData)

    @property
    def chance(self) -> float:
        """Share of the validation images' pixels that are of their commonest class."""
        labels = self.images.validation.labels
        counts = np.bincount(labels[labels != IGNORED], minlength=self.num_classes)
        return float(counts.max() / max(counts.sum(), 1))

    @property
    def weights(self) -> Float[np.ndarray, " classes"]:
        """Weights of the classes by median frequency, see `train.steps.pixel_losses`."""
        return median_frequency_weights(self.images.train.labels, self.num_classes)

    @property
    def training_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what the network sees in training."""
        return (*(self.config.crop or self.shape[:2]), self.shape[2])

    @cached_property
    def vary(self) -> Callable:
        """(key, images, labels) -> the network's input and its labels, int32."""
        config = self.config

        def vary(key, images, labels) -> tuple[Array, Int[Array, "n h w"]]:
            x, labels = vary_pairs(
                key,
                images,
                labels,
                mean=self.images.mean,
                crop=config.crop,
                scales=(config.smallest_scale, config.largest_scale),
                flip=config.flip,
                colour=config.colour,
            )
            return self.images.normalize(x), labels.astype(np.int32)

        return vary


def make_prepare_maps(images: Maps) -> Callable:
    """`prepare(key, images, labels) -> (x, labels, labels)` of a training step."""

    # Of several trainings at once one after the other: vmapped, the generator `train.state.RANDOM` draws other numbers.
    @jax.custom_batching.sequential_vmap
    def prepare(key, x, labels):
        x, labels = images.vary(key, x, labels)
        return x, labels, labels

    return prepare


def load_maps(config: SegmentationData, data_dir: Path | None, *, batch_size: int) -> Maps:
    """The data set of an experiment.

    Args:
      config: Which one.
      data_dir: Root of the data. None takes the environment's QPDE_DATA_DIR.
      batch_size: Images a step.
    Raises:
      ValueError: No folder is given for a set that lies in files, or a file cannot be used; names it.
      FileNotFoundError: The files are not in the folder, or one has no partner.
      ImportError: A package is missing.
    """
    return Maps(_load(config, data_dir), batch_size, config)


def _load(config: SegmentationData, data_dir: Path | None) -> Images:
    if (own := folder_of(config.name)) is not None:
        return load_label_maps(Path(own).expanduser(), size=config.size)
    root = data_root(config.name, data_dir)
    if config.name.startswith(PREFIX):
        return _prepared_cityscapes(config, root)
    if config.name == "cityscapes":
        return load_cityscapes(root, size=config.size, validation=config.validation)
    return load_camvid(root, size=config.size)


def _prepared_cityscapes(config: SegmentationData, root: Path) -> Images:
    """Cityscapes as tensorflow-datasets prepares it: images and label ids, tested on its validation images."""
    builder = find_builder(config.name, root)

    def read(part: str) -> Split:
        try:
            source = builder.as_data_source(part)
        except NotImplementedError as error:  # no files, or files of another format
            name = config.name.removeprefix(PREFIX)
            raise FileNotFoundError(
                f"data {config.name!r} is not prepared in {root}: python -m train data prepare {name} --data-dir {root}"
            ) from error
        return _stacked(source, config, f"{config.name} {part}")

    train, held_out = split_train(read("train"), config.validation, where=config.name)
    return as_images([train, held_out, read("validation")], CLASSES, where=root)


def _stacked(source: Any, config: SegmentationData, name: str) -> Split:
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for number in range(len(source)):
        example = source[number]
        ids = np.asarray(example["segmentation_label"])[..., 0]
        classes = classes_of_ids(ids, where=f"record {number} of {name}")
        images.append(_resized(np.asarray(example["image_left"]), config.size, smooth=True))
        labels.append(_resized(classes, config.size, smooth=False))
    return Split(np.stack(images), np.stack(labels))


def _resized(image: np.ndarray, size: tuple[int, int] | None, *, smooth: bool) -> np.ndarray:
    if size is None or image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    # Pillow knows no signed bytes; label maps come back as they were.
    return np.asarray(Image.fromarray(image.view(np.uint8)).resize(size[::-1], how)).view(image.dtype)


__all__ = ["Maps", "load_maps", "make_prepare_maps"]
