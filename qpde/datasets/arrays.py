"""Your own images as arrays in an npz file."""

import zipfile
import zlib
from os import PathLike
from pathlib import Path

import numpy as np

from qpde.datasets.containers import Images, Split, channel_statistics, split_parts
from qpde.datasets.folders import PARTS

_IMAGES, _LABELS = ("images", "x"), ("labels", "y")


def load_npz(path: str | PathLike[str], *, validation: float = 0.1, test: float = 0.2) -> Images:
    """Read images with labels from a file that `numpy.savez` wrote.

    It holds `images` and `labels`, or these for each part: `train_images`, `train_labels`, `test_images` and so on.
    Short names are x and y, as in `x_train`; validation may be called val or valid. Parts that are missing are held out
    from the rest. Images are uint8 (N, H, W) or (N, H, W, channels). Labels are whole numbers from 0, with their names
    in `classes` if there are any, or names themselves.

    Args:
      path: The file.
      validation: Share of the training images held out to validate on, with the classes in proportion.
      test: Share of all images held out to test on, alike.
    Returns:
      `Images`, in the order of the file.
    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no such file, an array is missing or of another type or shape, or there are too few images.
    """
    path = Path(path)
    arrays = _read(path)
    images, labels = {}, {}
    for part, names in [("train", ("",)), *PARTS.items()]:
        x, y = (_find(arrays, path, kinds, names) for kinds in (_IMAGES, _LABELS))
        if (x is None) != (y is None):
            raise ValueError(f"{path} has {x or y} without its {'labels' if x else 'images'}: {sorted(arrays)}")
        if x is None or y is None:
            continue
        if part in images:
            raise ValueError(f"{path} has images with and without the name of a part: {sorted(arrays)}")
        images[part], labels[part] = _as_images(arrays[x], f"{path}: {x}"), _as_labels(arrays[y], f"{path}: {y}")
        if len(images[part]) != len(labels[part]):
            raise ValueError(f"{path}: {x} has {len(images[part])} images, {y} {len(labels[part])} labels")
    if "train" not in images:
        raise ValueError(f"{path} has no images and labels, nor train_images and train_labels: {sorted(arrays)}")
    if len(shapes := {x.shape[1:] for x in images.values()}) > 1:
        raise ValueError(f"{path} has parts with images of different shapes {sorted(shapes)}")
    classes, labels = _classes(labels, arrays.get("classes"), path)
    everything = Split(np.concatenate(list(images.values())), np.concatenate(list(labels.values())))
    ends = np.cumsum([len(x) for x in images.values()])
    numbers = {part: np.arange(end - len(images[part]), end) for part, end in zip(images, ends, strict=True)}
    numbers = split_parts(everything.labels, numbers, validation=validation, test=test, what=str(path))
    parts = {part: Split(everything.images[own], everything.labels[own]) for part, own in numbers.items()}
    mean, std = channel_statistics(parts["train"].images)
    return Images(parts["train"], parts["validation"], parts["test"], classes, mean, std)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give one that numpy.savez wrote")
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            with file:
                return {name: file[name] for name in file.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no file of arrays that numpy.savez wrote: {error}") from error


def _find(arrays: dict[str, np.ndarray], path: Path, kinds: tuple[str, ...], parts: tuple[str, ...]) -> str | None:
    """The name of a part's images, or of its labels."""
    possible = [f"{part}_{kind}".lstrip("_") for part in parts for kind in kinds]
    possible += [f"{kind}_{part}" for part in parts for kind in kinds if part]
    found = [name for name in possible if name in arrays]
    if len(found) > 1:
        raise ValueError(f"{path} has {found[0]} and {found[1]}, which mean the same: leave one out")
    return found[0] if found else None


def _as_images(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ValueError(f"{what} has dtype {array.dtype}: give uint8 from 0 to 255, white being 255")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(f"{what} has shape {array.shape}: give (N, height, width) or (N, height, width, channels)")
    if array.ndim == 4 and array.shape[-1] > 4 >= array.shape[1]:
        raise ValueError(f"{what} has shape {array.shape}: channels come last, so transpose it by (0, 2, 3, 1)")
    return array if array.ndim == 4 else array[..., None]


def _as_labels(array: np.ndarray, what: str) -> np.ndarray:
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise ValueError(f"{what} has shape {array.shape} and dtype {array.dtype}: give a number or a name an image")
    return labels


def _classes(
    labels: dict[str, np.ndarray], named: np.ndarray | None, path: Path
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Names of the classes, and the labels as int32."""
    if any(own.dtype.kind == "U" for own in labels.values()):
        if not all(own.dtype.kind == "U" for own in labels.values()):
            raise ValueError(f"{path} has names as labels in some parts and numbers in others")
        names = np.unique(np.concatenate(list(labels.values()))) if named is None else np.asarray(named)
        number = {str(name): k for k, name in enumerate(names)}
        if unknown := {str(name) for own in labels.values() for name in own} - number.keys():
            raise ValueError(f"{path} has the label {min(unknown)!r}, which `classes` lacks: {list(number)}")
        labels = {part: np.array([number[str(name)] for name in own]) for part, own in labels.items()}
    else:
        count = 1 + max(int(own.max()) for own in labels.values())
        names = np.arange(count) if named is None else np.asarray(named)
    if names.ndim != 1 or len(set(map(str, names))) < max(2, len(names)):
        raise ValueError(f"{path} has the classes {[str(name) for name in names]}: two different names are needed")
    for part, own in labels.items():
        if own.min() < 0 or own.max() >= len(names):
            raise ValueError(
                f"{path} has labels from {own.min()} to {own.max()} in {part}, outside 0..{len(names) - 1}"
            )
    absent = np.flatnonzero(np.bincount(labels["train"].astype(np.int64), minlength=len(names)) == 0)
    if len(absent):
        raise ValueError(f"{path} has no training image of class {absent[0]} ({names[absent[0]]})")
    return tuple(map(str, names)), {part: own.astype(np.int32) for part, own in labels.items()}
