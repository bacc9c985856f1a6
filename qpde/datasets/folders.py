"""Your own pictures, a folder for each class."""

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from qpde.datasets.containers import Images, Split, channel_statistics, split_parts
from qpde.pictures import CENTRE, centre_crop, find_files, is_hidden, open_picture, seen_size

PARTS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
"""Names of the folders, or of the arrays, of each part."""

_NAMED = 10
"""Unreadable files that a message lists."""

_TRIED = (8, 8, 3)
"""Shape to which a picture is decoded to see whether it can be."""


@dataclass(frozen=True, eq=False)
class PictureFolder:
    """What lies in a folder of pictures.

    Attributes:
      root: The folder.
      classes: Their names, sorted; label k is classes[k].
      paths: Files below `root`, of those that can be read.
      labels: (N,) int32.
      train: Numbers of the files to train on, sorted.
      validation: Numbers of the files to validate on.
      test: Numbers of the files to test on.
      size: (width, height) if it is that of all pictures, or None.
      contents: Digest of all names and bytes.
      unreadable: Files that were skipped.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    size: tuple[int, int] | None
    contents: str
    unreadable: tuple[str, ...] = ()

    @property
    def skipped(self) -> str:
        """A line about the files that were skipped; empty if there are none."""
        if not self.unreadable:
            return ""
        return f"{self.root}: skipped {len(self.unreadable)} unreadable pictures: {_listed(self.unreadable)}"


def load_folder(
    root: str | PathLike[str],
    *,
    size: int,
    channels: int = 3,
    centre: float = CENTRE,
    validation: float = 0.1,
    test: float = 0.2,
    skip_unreadable: bool = False,
) -> Images:
    """Read pictures of any sizes as squares, all into memory.

    Args:
      root: Folder with a folder of pictures for each class, or with folders train, validation and test of this kind.
        validation may be called val or valid, and parts that are missing are held out from the rest.
      size: Side of the squares in pixels.
      channels: 3 for colours, 1 for shades of grey.
      centre: Share of a picture's short side that is looked at; pictures that all have the size stay as they are.
      validation: Share of the training pictures held out to validate on, with the classes in proportion.
      test: Share of all pictures held out to test on, alike.
      skip_unreadable: Leave pictures out that cannot be read, with a warning that names them.
    Returns:
      `Images`, sorted by class and name.
    Raises:
      FileNotFoundError: There is no such folder.
      ValueError: No classes, a class without pictures, unreadable pictures, or too few to hold some out.
      ImportError: Pillow is missing.
    """
    if channels not in (1, 3):
        raise ValueError(f"`channels` (={channels}) must be 1 or 3")
    found = find_pictures(root, validation=validation, test=test, skip_unreadable=skip_unreadable)
    if found.skipped:
        warnings.warn(found.skipped, stacklevel=2)
    shape, centre = (size, size, channels), 1.0 if found.size == (size, size) else centre

    def read(numbers: np.ndarray) -> Split:
        files = ((found.root / found.paths[number]).read_bytes() for number in numbers)
        return Split(np.stack([centre_crop(file, shape, centre=centre) for file in files]), found.labels[numbers])

    train, validating, testing = (read(numbers) for numbers in (found.train, found.validation, found.test))
    mean, std = channel_statistics(train.images)
    return Images(train, validating, testing, found.classes, mean, std, centre=centre)


def find_pictures(
    root: str | PathLike[str], *, validation: float = 0.1, test: float = 0.2, skip_unreadable: bool = False
) -> PictureFolder:
    """Find the pictures of each class, and read each once to see whether that works.

    Args:
      root: As for `load_folder`.
      validation: As for `load_folder`.
      test: As for `load_folder`.
      skip_unreadable: As for `load_folder`.
    Raises:
      FileNotFoundError, ValueError, ImportError: As for `load_folder`.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give one with a folder of pictures for each class")
    layout = _layout(root)
    classes = _classes(layout["train"])
    files = [
        (part, label, path)
        for part, folder in layout.items()
        for label, name in enumerate(_checked(classes, folder))
        for path in find_files(folder / name)
    ]
    seen = _inspect([path for *_, path in files])
    bad = {path: result for (*_, path), result in zip(files, seen, strict=True) if isinstance(result, OSError)}
    if bad and not skip_unreadable:
        listed = _listed([f"{path.relative_to(root)} ({error})" for path, error in bad.items()])
        raise ValueError(
            f"{len(bad)} of {len(files)} pictures in {root} cannot be read: {listed}. Mend or remove them, or skip "
            "them by skip_unreadable"
        )
    kept = [(*file, result) for file, result in zip(files, seen, strict=True) if not isinstance(result, OSError)]
    labels = np.array([label for _, label, *_ in kept], np.int32)
    numbers = {part: np.array([i for i, file in enumerate(kept) if file[0] == part], int) for part in layout}
    _check_classes(classes, labels[numbers["train"]], layout["train"])
    numbers = split_parts(labels, numbers, validation=validation, test=test, what=str(root))
    paths = tuple(path.relative_to(root).as_posix() for *_, path, _ in kept)
    lines = [f"{digest} {path}\n" for path, (*_, (digest, _)) in zip(paths, kept, strict=True)]
    sizes = {size for *_, (_, size) in kept}
    return PictureFolder(
        root,
        classes,
        paths,
        labels,
        **numbers,
        size=sizes.pop() if len(sizes) == 1 else None,
        contents=hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest(),
        unreadable=tuple(path.relative_to(root).as_posix() for path in bad),
    )


def _layout(root: Path) -> dict[str, Path]:
    """The folder of each part that has one."""
    inside = [path.name for path in _folders(root)]
    if "train" not in inside or not set(inside) <= {name for names in PARTS.values() for name in names}:
        return {"train": root}
    found = {part: [root / name for name in names if name in inside] for part, names in PARTS.items()}
    for part, folders in found.items():
        if len(folders) > 1:
            raise ValueError(f"{root} has two folders for {part}, {folders[0].name} and {folders[1].name}: remove one")
    return {part: folders[0] for part, folders in found.items() if folders}


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not is_hidden(Path(entry.name)))


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(path.name for path in _folders(folder))
    if len(classes) < 2:
        raise ValueError(f"{folder} has {len(classes)} folders: a folder of pictures for each of two classes is needed")
    return classes


def _checked(classes: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The classes; ValueError for a folder that is none of them."""
    if unknown := [path.name for path in _folders(folder) if path.name not in classes]:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, which the training pictures lack: {list(classes)}")
    return classes


def _check_classes(classes: tuple[str, ...], labels: np.ndarray, folder: Path) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise ValueError(f"{folder / empty[0]} has no pictures that can be read: remove the folder, or fill it")


def _inspect(paths: list[Path]) -> list[tuple[str, tuple[int, int]] | OSError]:
    """For each file its digest and size, or why it cannot be read."""

    def look(path: Path) -> tuple[str, tuple[int, int]] | OSError:
        try:
            file = path.read_bytes()
            centre_crop(file, _TRIED, centre=1.0)
            return hashlib.sha256(file).hexdigest(), seen_size(open_picture(file))
        except OSError as error:
            return error

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        return list(threads.map(look, paths))


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
