"""From a configuration to its set of images, kept on the device if it fits and read during training if not."""

import dataclasses
from pathlib import Path

import numpy as np

from qpde.datasets import Images, Split, load_cifar10, load_digits
from qpde.datasets.containers import channel_statistics
from train.config.images import Data
from train.config.segmentation import SegmentationData
from train.data.maps import load_maps
from train.data.reader import Central, read_all
from train.data.resident import ImageSet, Resident, data_root
from train.data.streamed import Streamed, shape_of
from train.data.tfds_records import PREFIX, Records, open_records

_FITS = 2 * 2**30
"""Bytes of training images up to which a prepared set is kept on the device."""

_MEASURED = 2000
"""Training images from which mean and standard deviation of a prepared set are taken."""


def load_images(
    config: Data | SegmentationData, data_dir: Path | None, *, batch_size: int, workers: int = 0
) -> ImageSet:
    """The data set of an experiment.

    Args:
      config: which one.
      data_dir: root of the data; None takes the environment's QPDE_DATA_DIR.
      batch_size: images a step.   workers: processes that read, where images are read during training.
    Raises:
      ValueError: no folder is given for a set that lies in files, or no such set, or its parts do not fit together.
      FileNotFoundError: the files are not in the folder.
      ImportError: a prepared set needs a package that is missing.
    """
    if isinstance(config, SegmentationData):
        return Resident(load_maps(config, data_dir), batch_size)
    if config.name.startswith(PREFIX):
        return _load_prepared(config, data_root(config.name, data_dir), batch_size, workers)
    if config.streamed:
        raise ValueError(f"data.streamed (=True) is for prepared sets, {PREFIX}NAME, not for {config.name!r}")
    if config.name == "digits":
        images = load_digits(size=config.size)
    else:
        root = data_root(config.name, data_dir)
        images = load_cifar10(root, validation_fraction=config.validation)
    if config.test is not None:
        test = _other_test(config, data_dir, images.train.images.shape[1:], images.num_classes)
        images = dataclasses.replace(images, test=Split(*read_all(test, Central(config.size))))
    return Resident(images, batch_size)


def _load_prepared(config: Data, root: Path, batch_size: int, workers: int) -> ImageSet:
    everything = open_records(config.name, "train", root)
    held_out = max(1, round(config.validation * len(everything)))
    order = np.random.default_rng(0).permutation(len(everything))
    train, validation = (everything.take(np.sort(part)) for part in (order[held_out:], order[:held_out]))
    shape, classes = shape_of(train, config.size), train.classes
    test = _other_test(config, root, shape, len(classes)) if config.test else open_records(config.name, "test", root)
    pixels = Central(config.size)
    sample = np.linspace(0, len(train) - 1, min(len(train), _MEASURED)).astype(int)
    mean, std = channel_statistics(read_all(train.take(sample), pixels)[0])
    fits = train.is_uniform and len(train) * np.prod(shape) <= _FITS
    if not fits and config.streamed is False:
        raise ValueError(f"data.streamed (=False) needs images of one size, {_FITS:,} bytes at most: leave it out")
    if config.streamed or not fits:
        nothing = Split(np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32))
        stored = Images(nothing, nothing, nothing, classes, mean, std)
        return Streamed(train, validation, test, config, batch_size, workers, stored)
    parts = (Split(*read_all(part, pixels)) for part in (train, validation, test))
    return Resident(Images(*parts, classes, mean, std), batch_size)


def _other_test(config: Data, data_dir: Path | None, shape: tuple[int, ...], num_classes: int) -> Records:
    """The test images of another set than the training images."""
    test = open_records(config.test, "test", data_root(config.test, data_dir))
    found = (shape_of(test, config.size), len(test.classes))
    if found != (tuple(shape), num_classes):
        raise ValueError(
            f"data.test (={config.test!r}) has images of {found[0]} and {found[1]} classes, "
            f"{config.name!r} images of {tuple(shape)} and {num_classes} classes"
        )
    return test
