"""Image sets that tensorflow-datasets has prepared, as random access to their records; TensorFlow is not needed.

`python -m train data prepare NAME` prepares one, once.  Reading takes tensorflow-datasets, which is imported with the
first such set, and the array_record files alone.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "tfds/"
"""A data set's name in a configuration is this and its name in the catalogue of tensorflow-datasets."""

FOLDER = "tensorflow_datasets"
"""Below the root of the data."""

_LABELLED_TEST = {"imagenet2012": "validation"}
"""Split to test on where it is not "test"; the test images of ImageNet come without labels."""


class DataError(Exception):
    """A record cannot be read, or is no image."""


@dataclasses.dataclass(frozen=True)
class Records:
    """Labelled images that are read when they are asked for.

    Attributes:
      name: of the set and split, for messages.
      source: record number -> {"image": ..., "label": ...}; can be pickled.
      numbers: (N,) of the records that belong to this set.
      shape: (height, width, channels) of the images; height and width are None where they differ.
      classes: names; label k is classes[k].
    """

    name: str
    source: Sequence[dict[str, Any]]
    numbers: np.ndarray
    shape: tuple[int | None, int | None, int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[np.ndarray | bytes, int]:
        """(image, label): the pixels, uint8 (height, width, channels), or of images of different sizes the file.

        Raises:
          DataError: the record is damaged or its label is no class.
        """
        number = int(self.numbers[position])
        try:
            example = self.source[number]
        except (RuntimeError, ValueError, OSError) as error:  # array_record's, the decoder's
            raise DataError(f"{self.name}: record {number} cannot be read ({error}): prepare the set again") from error
        label = int(example["label"])
        if not 0 <= label < len(self.classes):
            raise DataError(f"{self.name}: record {number} has label {label}, outside 0..{len(self.classes) - 1}")
        return example["image"], label

    def take(self, positions: np.ndarray) -> "Records":
        """The records at these positions, in their order."""
        return dataclasses.replace(self, numbers=self.numbers[positions])

    @property
    def is_uniform(self) -> bool:
        """Whether all images have one size."""
        return None not in self.shape


def open_records(name: str, part: str, root: Path) -> Records:
    """The training or the test images of a prepared set.

    Args:
      name: `PREFIX` and what `tfds.builder` takes, such as "tfds/cifar100" or "tfds/cifar10_corrupted/fog_3".
      part: "train", or "test" for the images to test on.
      root: of the data; the set lies in its folder `FOLDER`.
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
      name, root: as for `open_records`.   options: more arguments of `tfds.builder`.
    Raises:
      ValueError: there is no such set.   ImportError: tensorflow-datasets is missing.
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
