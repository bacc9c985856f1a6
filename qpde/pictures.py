"""From the file of a picture to the pixels that a network takes, by Pillow. Nothing here needs JAX.

Whatever a file holds, it is looked at as a person would see it: turned as its EXIF orientation says, palettes as
colours, transparent parts on white, 16 bits of grey with 65535 as white, the first picture of several.
"""

import io
import math
import os
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "CENTRE",
    "SUFFIXES",
    "centre_crop",
    "find_files",
    "list_pictures",
    "open_picture",
    "read_picture",
    "resized",
    "shown",
]

CENTRE = 224 / 256
"""Share of a photograph's short side that the usual evaluation looks at."""

_KNOWN = "avif bmp gif heic heif jfif jpeg jpg pbm pgm png pnm ppm tif tiff webp"
SUFFIXES = frozenset(f".{name}" for name in _KNOWN.split())
"""How names of pictures end, whether or not this Pillow can read them."""

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""EXIF's tag, and its values that swap height and width."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the picture as it is seen."""


def find_files(folder: str | PathLike[str]) -> list[Path]:
    """Find the pictures below a folder by their names, sorted; hidden files and folders are left out.

    Args:
      folder: Where to look. Links to folders inside it are not followed.
    """
    folder = Path(folder)
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in found if not is_hidden(path.relative_to(folder)) and not path.is_dir())


def list_pictures(files: Sequence[str | PathLike[str]]) -> tuple[list[Path], list[Path]]:
    """List all pictures, and the folders without any.

    Args:
      files: Pictures, and folders, of which all pictures below are taken.
    """
    paths, empty = [], []
    for path in map(Path, files):
        below = find_files(path) if path.is_dir() else [path]
        paths += below
        empty += [] if below else [path]
    return paths, empty


def shown(path: Path) -> str:
    """Return the path as text that every terminal and encoding takes.

    Args:
      path: Path of a file.
    """
    return os.fsencode(path).decode(errors="backslashreplace")


def is_hidden(path: Path) -> bool:
    """Whether a part of the path is a file or folder that systems keep for themselves."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def read_picture(path: str | PathLike[str], shape: tuple[int, int, int], *, centre: float = 1.0) -> np.ndarray:
    """Read a picture as evaluation sees it.

    Args:
      path: File of any format that Pillow reads.
      shape: (height, width, channels) of the result; 1 channel of grey or 3 of colours.
      centre: As for `centre_crop`.
    Returns:
      uint8 of that shape.
    Raises:
      OSError: The file cannot be read, is damaged or no picture.
      ImportError: Pillow is missing.
    """
    with open(fspath(path), "rb") as file:
        return centre_crop(file.read(), shape, centre=centre)


def centre_crop(file: bytes, shape: tuple[int, int, int], *, centre: float = CENTRE) -> np.ndarray:
    """Cut the middle out of a picture and resize it.

    Args:
      file: Content of a file of any format that Pillow reads.
      shape: (height, width, channels) of the result; 1 channel of grey or 3 of colours.
      centre: Share of the largest part of that aspect ratio that is looked at, in (0, 1].
    Returns:
      uint8 of that shape. A picture that has it and is looked at as a whole stays as it is.
    Raises:
      OSError: The file is damaged or no picture.
      ImportError: Pillow is missing.
    """

    def middle(width: int, height: int) -> Box:
        scale = centre * min(height / shape[0], width / shape[1])
        h, w = scale * shape[0], scale * shape[1]
        left, top = (width - w) / 2, (height - h) / 2
        return left, top, left + w, top + h

    return resized(file, middle, shape)


def resized(file: bytes, choose: Callable[[int, int], Box], shape: tuple[int, int, int]) -> np.ndarray:
    """Cut a part out of a picture and resize it; it is decoded only as finely as that needs.

    Args:
      file: As for `centre_crop`.
      shape: As for `centre_crop`.
      choose: (width, height) of the picture as it is seen -> the part.
    Returns:
      uint8 of that shape.
    Raises:
      OSError, ImportError: As for `centre_crop`.
    """
    height, width, channels = shape
    with open_picture(file) as image:
        seen = seen_size(image)
        box = choose(*seen)
        finer = max(width / (box[2] - box[0]), height / (box[3] - box[1]))
        mode = "RGB" if channels == 3 else "L"
        image.draft(mode, tuple(math.ceil(side * finer) for side in image.size))  # JPEG by 1, 2, 4, 8; others not
        whole = _guarded(lambda: _in_mode(_upright(image), mode))
        x, y = whole.size[0] / seen[0], whole.size[1] / seen[1]
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        pixels = np.asarray(whole.resize((width, height), _pillow().Resampling.BILINEAR, box=box))
    return pixels[..., None] if channels == 1 else pixels


def open_picture(file: bytes) -> Any:
    """Open a picture without decoding it.

    Args:
      file: Content of a file of any format that Pillow reads.
    Returns:
      The `PIL.Image.Image`.
    Raises:
      OSError: It is no picture, or one of more than 178 million pixels.
      ImportError: Pillow is missing.
    """
    image = _pillow()
    return _guarded(lambda: image.open(io.BytesIO(file)))


def seen_size(image: Any) -> tuple[int, int]:
    """(width, height) of an opened picture as it is seen.

    Args:
      image: Result of `open_picture`.
    """
    return image.size[::-1] if _orientation(image) in _TURNED else image.size


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures are read by pillow, which is missing: pip install pillow") from error
    return Image


def _guarded(read: Callable[[], Any]) -> Any:
    """What `read` returns; whatever a decoder raises on a damaged file, as OSError."""
    try:
        return read()
    except _pillow().UnidentifiedImageError:
        raise OSError("it is no picture that this Pillow reads") from None
    except (OSError, ImportError):
        raise
    except Exception as error:  # SyntaxError, struct.error, ValueError, ...: each of Pillow's formats has its own
        raise OSError(str(error) or type(error).__name__) from error


def _orientation(image: Any) -> int:
    """EXIF's number, 1 where there is none or it cannot be read."""
    try:
        return _guarded(image.getexif).get(_ORIENTATION, 1)
    except OSError:
        return 1


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _in_mode(image: Any, mode: str) -> Any:
    """The picture as 8-bit "RGB" or "L"."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise OSError("pixels are floating-point numbers, whose white is unknown")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = _pillow().new("RGBA", image.size, "white")
        image = _pillow().alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(image: Any) -> Any:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise OSError(f"pixels from {values.min()} to {values.max()} are no 16-bit numbers, so white is unknown")
    return _pillow().fromarray((values.astype(np.int64) >> 8).astype(np.uint8))
