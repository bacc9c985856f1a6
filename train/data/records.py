"""Labelled images that are read when they are asked for, whatever they lie in.

Nothing here needs JAX, because whatever it imports each worker process imports too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qpde.pictures import centre_crop


class Source(Protocol):
    """Examples by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


class DataError(Exception):
    """A record cannot be read, or is no image."""


@dataclasses.dataclass(frozen=True)
class Records:
    """Labelled images that are read when they are asked for.

    Attributes:
      name: Name of the set and split, for messages.
      source: Record number -> {"image": ..., "label": ...}; can be pickled.
      numbers: (N,) numbers of the records that belong to this set.
      shape: (height, width, channels) of the images; height and width are None where they differ.
      classes: Their names; label k is classes[k].
      contents: Digest of all that `source` holds, where that is known.
    """

    name: str
    source: Source
    numbers: np.ndarray
    shape: tuple[int | None, int | None, int]
    classes: tuple[str, ...]
    contents: str = ""

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
            advice = "" if isinstance(self.source, Files) else ": prepare the set again"
            raise DataError(f"{self.name}: {self.called(position)} cannot be read ({error}){advice}") from error
        label = int(example["label"])
        if not 0 <= label < len(self.classes):
            raise DataError(f"{self.name}: record {number} has label {label}, outside 0..{len(self.classes) - 1}")
        return example["image"], label

    def called(self, position: int) -> str:
        """What messages call the record at a position."""
        number = int(self.numbers[position])
        return self.source.paths[number] if isinstance(self.source, Files) else f"record {number}"

    def take(self, positions: np.ndarray) -> "Records":
        """The records at these positions, in their order."""
        return dataclasses.replace(self, numbers=self.numbers[positions])

    @property
    def is_uniform(self) -> bool:
        """Whether all images have one size."""
        return None not in self.shape


@dataclasses.dataclass(frozen=True)
class Files:
    """The source of `Records` that are pictures in files.

    Attributes:
      root: Folder.
      paths: Files below it.
      labels: (N,) their classes.
      shape: (height, width, channels) of all of them, which are decoded then; or None, and the files come as they are.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    shape: tuple[int, int, int] | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        file = (self.root / self.paths[number]).read_bytes()
        image = file if self.shape is None else centre_crop(file, self.shape, centre=1.0)
        return {"image": image, "label": self.labels[number]}
