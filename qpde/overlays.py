"""Pictures with a class for every pixel: a label map and a coloured overlay of each photograph."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qpde.bits import Bits
from qpde.pictures import list_pictures, open_picture, resized, seen_size, shown
from qpde.trained import TrainedNetwork

__all__ = ["class_colours", "overlay", "write_maps"]

_SMALLEST_SIDE = 32


def class_colours(count: int) -> np.ndarray:
    """Colours that tell classes apart, as in Pascal VOC's label maps: uint8 (count, 3).

    Args:
      count: Number of classes, at most 255. The first one is not black, which is for what has no class.
    """
    numbers = np.arange(1, count + 1)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def overlay(image: np.ndarray, labels: np.ndarray, num_classes: int, *, share: float = 0.5) -> np.ndarray:
    """Mix an image with the colours of its classes.

    Args:
      image: uint8 (H, W, 3).
      labels: Classes (H, W). Negative where there is none: those pixels stay as they are.
      num_classes: Number of classes.
      share: Share of the colours, in [0, 1].
    Returns:
      uint8 (H, W, 3).
    """
    colours = class_colours(num_classes)[np.maximum(labels, 0)]
    mixed = (1 - share) * image + share * colours
    return np.where((labels >= 0)[..., None], np.round(mixed), image).astype(np.uint8)


def write_maps(
    network: TrainedNetwork,
    files: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    bits: Bits | None = None,
    out: Any = None,
    errors: Any = None,
) -> int:
    """Predict the class of every pixel of pictures, and write it as pictures of their size.

    A picture is looked at as a whole, resized to about as many pixels as the network was trained on. NAME_labels.png
    holds the number of the class of each pixel, with its colour as a palette; NAME_overlay.png the picture with these
    colours. A line for each picture names the classes by their shares.

    Args:
      network: A segmentation network.
      files: Pictures, and folders, of which all pictures below are taken.
      folder: Where the maps go, made if need be.
      bits: Bits. Default: the network's own.
      out: Text file where the lines go. Default: standard output.
      errors: Text file where files that cannot be read are named. Default: standard error.
    Returns:
      The exit status: 0, or 1 if a file could not be read; the others are predicted all the same.
    Raises:
      ValueError: A network that has no class for every pixel, or whose input is unknown.
      ImportError: Pillow is missing.
    """
    if not network.is_segmenting:
        raise ValueError("this network has a class for a picture, not for every pixel: use qpde.predictions")
    shape = network.input_shape
    if shape is None or shape[2] != 3:
        raise ValueError(f"this network takes inputs of shape {shape}: save it with input_shape=(height, width, 3)")
    out, errors, folder = out or sys.stdout, errors or sys.stderr, Path(folder)
    paths, empty = list_pictures(files)
    for path in empty:
        print(f"error: {shown(path)} has no pictures below it", file=errors)
    folder.mkdir(parents=True, exist_ok=True)
    status = 1 if empty else 0
    for number, name in enumerate(_distinct(paths)):
        try:
            seen, pixels = _read(paths[number], shape)
        except OSError as error:
            print(f"error: {shown(paths[number])} cannot be read: {error.strerror or error}", file=errors)
            status = 1
            continue
        labels = network.predict(pixels[None], bits=bits)[0]
        _write(folder / name, seen, labels, len(network.classes))
        print(f"{shown(paths[number])}  {_shares(labels, network.classes)}", file=out)
    return status


def _read(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The picture as it is seen, and with about as many pixels as the shape; uint8 both."""
    content = path.read_bytes()
    with open_picture(content) as image:
        width, height = seen_size(image)
    scale = (shape[0] * shape[1] / (height * width)) ** 0.5
    size = [max(_SMALLEST_SIDE, round(scale * side)) for side in (height, width)]
    whole = lambda width, height: (0.0, 0.0, float(width), float(height))  # noqa: E731
    return resized(content, whole, (height, width, 3)), resized(content, whole, (*size, 3))


def _write(start: Path, seen: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    from PIL import Image

    numbers = Image.fromarray(labels.astype(np.uint8)).resize(seen.shape[1::-1], Image.Resampling.NEAREST)
    numbers.putpalette(class_colours(num_classes).tobytes())
    numbers.save(start.with_name(f"{start.name}_labels.png"))
    mixed = overlay(seen, np.asarray(numbers).astype(int), num_classes)
    Image.fromarray(mixed).save(start.with_name(f"{start.name}_overlay.png"))


def _shares(labels: np.ndarray, classes: Sequence[str]) -> str:
    shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    return ", ".join(f"{classes[k]} {shares[k]:.1%}" for k in np.argsort(-shares, kind="stable") if shares[k] > 0)


def _distinct(paths: Sequence[Path]) -> list[str]:
    """A name for each picture: its own, with a number where two have the same."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name, count = path.stem, 1
        while name in taken:
            count += 1
            name = f"{path.stem}_{count}"
        taken.add(name)
        names.append(name)
    return names
