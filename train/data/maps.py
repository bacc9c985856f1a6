"""Sets of images with label maps, as a configuration names them."""

from pathlib import Path
from typing import Any

import numpy as np

from qpde.datasets import Images, Split, load_camvid, load_cityscapes, load_label_maps
from qpde.datasets.cityscapes import CLASSES, classes_of_ids, split_train
from qpde.datasets.label_maps import as_images
from train.config.images import FOLDER
from train.config.segmentation import SegmentationData
from train.data.resident import data_root, own_path
from train.data.tfds_records import PREFIX, find_builder

__all__ = ["load_maps"]


def load_maps(config: SegmentationData, data_dir: Path | None) -> Images:
    """The data set of an experiment.

    Args:
      config: Which one.
      data_dir: Root of the data. None takes the environment's QPDE_DATA_DIR.
    Raises:
      ValueError: No folder is given for a set that lies in files, or a file cannot be used; names it.
      FileNotFoundError: The files are not in the folder, or one has no partner.
      ImportError: A package is missing.
    """
    if config.name.startswith(FOLDER):
        return load_label_maps(own_path(config.name.removeprefix(FOLDER), data_dir), size=config.size)
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
