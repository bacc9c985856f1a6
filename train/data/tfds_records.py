"""Image sets that tensorflow-datasets has prepared, as random access to their records; TensorFlow is not needed.

`python -m train data prepare NAME` prepares one, once.  Reading takes tensorflow-datasets, which is imported with the
first such set, and the array_record files alone.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from train.data.records import Records

PREFIX = "tfds/"
"""A data set's name in a configuration is this and its name in the catalogue of tensorflow-datasets."""

FOLDER = "tensorflow_datasets"
"""Below the root of the data."""

_LABELLED_TEST = {"imagenet2012": "validation"}
"""Split to test on where it is not "test"; the test images of ImageNet come without labels."""


def open_records(name: str, part: str, root: Path) -> Records:
    """The training or the test images of a prepared set.

    Args:
      name: `PREFIX` and what `tfds.builder` takes, such as "tfds/cifar100" or "tfds/cifar10_corrupted/fog_3".
      part: "train", or "test" for the images to test on.
      root: Root of the data; the set lies in its folder `FOLDER`.
    Raises:
      ValueError: there is no such set or no such part of it, or its records are no labelled images; a file holds
        another number of records than it should.
      FileNotFoundError: the set is not prepared, or one of its files is missing.
      ImportError: tensorflow-datasets is missing.
    """
    builder = find_builder(name, root)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data {name!r} is no set of labelled images: its features are {sorted(features)}")
    split = _LABELLED_TEST.get(builder.name, "test") if part == "test" else part
    splits = builder.info.splits
    if splits and split not in splits:
        raise ValueError(f"data {name!r} has no split {split!r}: it has {sorted(splits)}")
    if splits:
        _check_files(name, splits[split])
    shape = tuple(features["image"].shape)
    as_stored = {} if None not in shape else {"decoders": {"image": _decode_nothing()}}
    try:
        source = builder.as_data_source(split, **as_stored)
    except NotImplementedError as error:  # no files, or files of another format
        raise FileNotFoundError(
            f"data {name!r} is not prepared in {Path(root) / FOLDER}: python -m train data prepare "
            f"{name.removeprefix(PREFIX)} --data-dir {root}"
        ) from error
    return Records(f"{name} {split}", source, np.arange(len(source)), shape, tuple(features["label"].names))


def find_builder(name: str, root: Path, **options: Any) -> Any:
    """tensorflow-datasets' builder of a set.

    Args:
      name, root: as for `open_records`.
      options: more arguments of `tfds.builder`.
    Raises:
      ValueError: there is no such set.
      ImportError: tensorflow-datasets is missing.
    """
    tfds = _tfds()
    try:
        return tfds.builder(name.removeprefix(PREFIX), data_dir=os.fspath(Path(root) / FOLDER), **options)
    except ValueError as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"data {name!r} is not known to tensorflow-datasets: {first_line}") from error


def _tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"{PREFIX}... needs tensorflow-datasets: install the [train] extra") from error
    return tfds


def _decode_nothing() -> Any:
    return _tfds().decode.SkipDecoding()


def _check_files(name: str, split: Any) -> None:
    """Every file of a split is there and holds the records that dataset_info.json promises."""
    from array_record.python.array_record_module import ArrayRecordReader

    for part in split.file_instructions:
        path = Path(part.filename)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, one of {len(split.filenames)} files of {name} {split.name}, with "
                f"{part.examples_in_shard:,} records: prepare the set again"
            )
        try:
            reader = ArrayRecordReader(os.fspath(path))
            found = reader.num_records()
            reader.close()
        except RuntimeError:  # what is too short for an index of records
            found = 0
        if found != part.examples_in_shard:
            raise ValueError(
                f"{path} has {found:,} records in {path.stat().st_size:,} bytes, expected "
                f"{part.examples_in_shard:,} records: the file is damaged; delete it and prepare the set again"
            )
