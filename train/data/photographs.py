"""From the file of a photograph to square pixels, on the host: decoding, cropping and resizing by Pillow."""

import io
import math

import numpy as np

_SHORT_SIDE = 256 / 224
"""Evaluation looks at the centre of an image whose short side is this multiple of the crop's side."""

_LARGEST_ASPECT = 4 / 3
_TRIES = 10


def random_resized_crop(file: bytes, rng: np.random.Generator, *, size: int, smallest_area: float) -> np.ndarray:
    """A random part of a photograph, resized to a square (Szegedy et al., 2015): uint8 (size, size, 3).

    The part's area is uniform between `smallest_area` and the whole, its aspect ratio log-uniform between 3/4 and 4/3.
    If ten such parts do not fit into the image, it is the largest one in the centre of an aspect ratio in that range.

    Args:
      file: of any format that Pillow reads.   rng: what is drawn from it depends on the image's size alone.
      size: side in pixels, at least 1.   smallest_area: share of the image, in (0, 1].
    Raises:
      OSError: the file is damaged or no image.
    """
    image = _open(file)
    return _resized(image, _random_box(image.size, rng, smallest_area), size)


def centre_crop(file: bytes, *, size: int) -> np.ndarray:
    """The centre of a photograph: uint8 (size, size, 3); the usual evaluation, 224 out of a short side of 256.

    Resizing the short side to size * 256/224 and cropping the centre is cropping first and resizing then.

    Args, Raises: as for `random_resized_crop`.
    """
    image = _open(file)
    width, height = image.size
    side = min(width, height) / _SHORT_SIDE
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, (left, top, left + side, top + side), size)


def _open(file: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(file))


def _random_box(shape: tuple[int, int], rng: np.random.Generator, smallest_area: float) -> tuple[float, ...]:
    """(left, top, right, bottom)."""
    width, height = shape
    for _ in range(_TRIES):
        area = width * height * rng.uniform(smallest_area, 1)
        aspect = math.exp(rng.uniform(-math.log(_LARGEST_ASPECT), math.log(_LARGEST_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w, endpoint=True), rng.integers(0, height - h, endpoint=True)
            return float(left), float(top), float(left + w), float(top + h)
    w, h = min(width, height * _LARGEST_ASPECT), min(height, width * _LARGEST_ASPECT)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _resized(image, box: tuple[float, ...], size: int) -> np.ndarray:
    """The part of an image inside the box, decoded only as finely as it is needed, as a square."""
    from PIL import Image

    width, height = image.size
    finer = size / min(box[2] - box[0], box[3] - box[1])
    image.draft("RGB", (math.ceil(width * finer), math.ceil(height * finer)))  # JPEG: by 1, 2, 4 or 8, the rest: not
    x, y = image.size[0] / width, image.size[1] / height
    box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))
