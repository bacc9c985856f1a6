"""The variation of photographs, on the host: a random part of each, decoded and resized by Pillow."""

import math

import numpy as np

from qpde.pictures import Box, resized

_LARGEST_ASPECT = 4 / 3
_TRIES = 10


def random_resized_crop(
    file: bytes, rng: np.random.Generator, *, shape: tuple[int, int, int], smallest_area: float
) -> np.ndarray:
    """Cut a random part out of a photograph and resize it (Szegedy et al., 2015).

    The part's area is uniform between `smallest_area` and the whole, its aspect ratio log-uniform between 3/4 and 4/3.
    If ten such parts do not fit into the image, it is the largest one in the centre of an aspect ratio in that range.

    Args:
      file: Content of a file of any format that Pillow reads.
      rng: What is drawn from it depends on the image's size alone.
      shape: (height, width, channels) of the result.
      smallest_area: Share of the image, in (0, 1].
    Returns:
      uint8 of that shape.
    Raises:
      OSError: The file is damaged or no image.
    """
    return resized(file, lambda width, height: _random_box((width, height), rng, smallest_area), shape)


def _random_box(size: tuple[int, int], rng: np.random.Generator, smallest_area: float) -> Box:
    width, height = size
    for _ in range(_TRIES):
        area = width * height * rng.uniform(smallest_area, 1)
        aspect = math.exp(rng.uniform(-math.log(_LARGEST_ASPECT), math.log(_LARGEST_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w, endpoint=True), rng.integers(0, height - h, endpoint=True)
            return float(left), float(top), float(left + w), float(top + h)
    most_w, most_h = min(width, height * _LARGEST_ASPECT), min(height, width * _LARGEST_ASPECT)
    x, y = (width - most_w) / 2, (height - most_h) / 2
    return x, y, x + most_w, y + most_h
