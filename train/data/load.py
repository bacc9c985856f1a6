"""From a configuration to its set of images, kept on the device if it fits and read during training if not."""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from qpde.datasets import Images, Split, load_cifar10, load_digits, load_npz
from qpde.datasets.containers import channel_statistics
from qpde.datasets.folders import find_pictures
from train.config.images import FOLDER, NPZ, Data
from train.config.segmentation import SegmentationData
from train.data.maps import load_maps
from train.data.reader import Central, read_all
from train.data.records import Files, Records
from train.data.resident import ImageSet, Resident, data_root, own_path
from train.data.streamed import Streamed, shape_of
from train.data.tfds_records import PREFIX, open_records
from train.host.distributed import is_first

_FITS = 2 * 2**30
"""Bytes of training images up to which a prepared set, or a folder, is kept on the device."""

_MEASURED = 2000
"""Training images from which mean and standard deviation of a prepared set are taken."""


def load_images(
    config: Data | SegmentationData, data_dir: Path | None, *, batch_size: int, workers: int = 0
) -> ImageSet:
    """The data set of an experiment.

    Args:
      config: which one.
      data_dir: root of the data; None takes the environment's QPDE_DATA_DIR.
      batch_size: images a step.
      workers: processes that read, where images are read during training.
    Raises:
      ValueError: no folder is given for a set that lies in files, or no such set, or its parts do not fit together;
        own images of which some cannot be read.
      FileNotFoundError: the files are not in the folder.
      ImportError: a prepared set needs a package that is missing.
    """
    if isinstance(config, SegmentationData):
        return Resident(load_maps(config, data_dir), batch_size)
    if config.name.startswith(PREFIX):
        root = data_root(config.name, data_dir)
        return _from_records(config, _prepared(config, root), data_dir, batch_size, workers)
    if config.name.startswith(FOLDER):
        return _from_records(config, _pictures(config, data_dir), data_dir, batch_size, workers)
    if config.streamed:
        raise ValueError(
            f"data.streamed (=True) is for prepared sets, {PREFIX}NAME, and {FOLDER}PATH, not for {config.name!r}"
        )
    if config.name == "digits":
        images = load_digits(size=config.size)
    elif config.name.startswith(NPZ):
        path = own_path(config.name.removeprefix(NPZ), data_dir)
        images = load_npz(path, validation=config.validation, test=config.test_share)
    else:
        root = data_root(config.name, data_dir)
        images = load_cifar10(root, validation_fraction=config.validation)
    if config.test is not None:
        shape = images.train.images.shape[1:]
        test = _other_test(config, config.test, data_dir, shape, images.num_classes)
        images = dataclasses.replace(images, test=Split(*read_all(test, Central(shape, config.centre))))
    return Resident(images, batch_size)


def _prepared(config: Data, root: Path) -> dict[str, Records]:
    """The parts of a prepared set, without "test" where the test images are those of another set."""
    everything = open_records(config.name, "train", root)
    held_out = max(1, round(config.validation * len(everything)))
    order = np.random.default_rng(0).permutation(len(everything))
    own = {} if config.test else {"test": open_records(config.name, "test", root)}
    train, validation = (everything.take(np.sort(part)) for part in (order[held_out:], order[:held_out]))
    return {"train": train, "validation": validation, **own}


def _pictures(config: Data, data_dir: Path | None) -> dict[str, Records]:
    """The parts of a folder of pictures."""
    found = find_pictures(
        own_path(config.name.removeprefix(FOLDER), data_dir),
        validation=config.validation,
        test=config.test_share,
        skip_unreadable=config.skip_unreadable,
    )
    if found.skipped and is_first():
        print(found.skipped, file=sys.stderr)
    shape = (config.size, config.size, config.channels)
    is_uniform = found.size == shape[:2]
    files = Files(found.root, found.paths, found.labels, shape if is_uniform else None)
    known = shape if is_uniform else (None, None, config.channels)
    return {
        part: Records(f"{found.root}", files, getattr(found, part), known, found.classes, found.contents)
        for part in ("train", "validation", "test")
    }


def _from_records(
    config: Data, parts: dict[str, Records], data_dir: Path | None, batch_size: int, workers: int
) -> ImageSet:
    train = parts["train"]
    shape, classes = shape_of(train, config.size), train.classes
    if config.test is not None:
        parts = parts | {"test": _other_test(config, config.test, data_dir, shape, len(classes))}
    centre = 1.0 if train.is_uniform else config.centre
    pixels = Central(shape, centre)
    sample = np.linspace(0, len(train) - 1, min(len(train), _MEASURED)).astype(int)
    mean, std = channel_statistics(read_all(train.take(sample), pixels)[0])
    fits = len(train) * np.prod(shape) <= _FITS
    if not fits and config.streamed is False:
        raise ValueError(f"data.streamed (=False) needs images of {_FITS:,} bytes at most: leave it out")
    if config.streamed or not fits or (config.streamed is None and not train.is_uniform):
        nothing = Split(np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32))
        stored = Images(nothing, nothing, nothing, classes, mean, std, centre=centre)
        return Streamed(**parts, config=config, batch_size=batch_size, workers=workers, stored=stored)
    splits = {part: Split(*read_all(records, pixels)) for part, records in parts.items()}
    images = Images(splits["train"], splits["validation"], splits["test"], classes, mean, std, centre=centre)
    return Resident(images, batch_size)


def _other_test(config: Data, name: str, data_dir: Path | None, shape: tuple[int, ...], num_classes: int) -> Records:
    """The test images of another set than the training images."""
    test = open_records(name, "test", data_root(name, data_dir))
    found = (shape_of(test, config.size), len(test.classes))
    if found != (tuple(shape), num_classes):
        raise ValueError(
            f"data.test (={name!r}) has images of {found[0]} and {found[1]} classes, "
            f"{config.name!r} images of {tuple(shape)} and {num_classes} classes"
        )
    return test
