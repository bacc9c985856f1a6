"""Images with a class for every pixel: pairs of files, read into arrays of one size."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from qpde.batches import IGNORED
from qpde.datasets.containers import Images, Split, channel_statistics
from qpde.datasets.folders import PARTS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IGNORED_IN_FILES = 255
"""The value of a label map of one's own where a pixel does not count, as in Pascal VOC."""

_OUTSIDE = np.iinfo(np.int16).min


def load_label_maps(root: str | PathLike[str], *, size: tuple[int, int] | None = None) -> Images:
    """Read a folder of one's own images and label maps.

    It holds classes.txt, a name a line, and train, validation and test with images and labels each. validation may be
    called val or valid. Or it holds images and labels alone: every tenth pair is for validation, another for testing.

        classes.txt
        train/images/a.jpg    train/labels/a.png    validation/...    test/...

    A label map has one channel, or a palette, with the number of a class for each pixel, from 0, and 255 where it does
    not count.

    Args:
      root: The folder.
      size: Height and width that everything is resized to. Default: images have one size.
    Returns:
      `Images` with label maps, `IGNORED` where a pixel does not count, sorted by file name.
    Raises:
      FileNotFoundError: A folder, an image or a label map is missing.
      ValueError: A file that is no image, sizes that differ, a label that is no class.
      ImportError: Pillow is missing.
    """
    root = Path(root)
    names = root / "classes.txt"
    if not names.is_file():
        raise FileNotFoundError(f"{names} is missing: a file with the name of a class on each line")
    classes = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
    if not 1 <= len(classes) <= IGNORED_IN_FILES:
        raise ValueError(f"{names} names {len(classes)} classes: give 1 to {IGNORED_IN_FILES}")
    table = {k: k for k in range(len(classes))} | {IGNORED_IN_FILES: IGNORED}
    if (root / "images").is_dir():
        pairs = find_pairs(root / "images", root / "labels")
        place = np.arange(len(pairs)) % 10
        chosen = [[pair for pair, i in zip(pairs, place, strict=True) if i in own] for own in (range(8), (8,), (9,))]
        if not all(chosen):
            raise ValueError(f"{root / 'images'} has {len(pairs)} images: give at least 10, or train, validation, test")
    else:
        chosen = [find_pairs(folder / "images", folder / "labels") for folder in _parts(root)]
    return as_images([read_pairs(pairs, table, size=size) for pairs in chosen], classes, where=root)


def _parts(root: Path) -> list[Path]:
    """The folders of the parts, under any of their names."""
    found = []
    for part, known in PARTS.items():
        folder = next((root / name for name in known if (root / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{root / part} is missing: give train, validation and test, or images and labels")
        found.append(folder)
    return found


def find_pairs(images: Path, labels: Path, *, ending: tuple[str, str] = ("", "")) -> list[tuple[Path, Path]]:
    """Images and their label maps, sorted by name.

    Args:
      images: Folder of images, searched with all folders in it.
      labels: Folder of label maps (.png), in the same folders of it.
      ending: What names of images and of label maps end in after the common part.
    Raises:
      FileNotFoundError: No images, or one without its partner.
    """

    def found(folder, suffixes, ending):
        return {
            path.relative_to(folder).with_name(path.stem.removesuffix(ending)): path
            for path in folder.rglob("*")
            if path.suffix.lower() in suffixes and path.stem.endswith(ending)
        }

    of_images, of_maps = found(images, IMAGE_SUFFIXES, ending[0]), found(labels, (".png",), ending[1])
    if not of_images:
        raise FileNotFoundError(f"{images} has no images ({', '.join(IMAGE_SUFFIXES)})")
    if unpaired := sorted(of_images.keys() ^ of_maps.keys()):
        raise FileNotFoundError(f"{len(unpaired)} files have no partner in {images} or {labels}, first {unpaired[0]}")
    return [(of_images[name], of_maps[name]) for name in sorted(of_images)]


def read_pairs(
    pairs: Sequence[tuple[Path, Path]], classes: Mapping[int, int], *, size: tuple[int, int] | None = None
) -> Split:
    """Decode images and label maps.

    Args:
      pairs: Paths of an image and of its label map.
      classes: Class, or `IGNORED`, of every value that a label map may hold, from 0 to 255.
      size: Height and width that they are resized to, label maps without interpolation. Default: as they are.
    Raises:
      ValueError: A file that is no image, or of another size; a value that is not in `classes`.
      ImportError: Pillow is missing.
    """
    table = np.full(256, _OUTSIDE, np.int16)
    table[list(classes)] = list(classes.values())
    images: np.ndarray | None = None
    labels = None
    for i, (path, map_path) in enumerate(pairs):
        pixels, classed = _read(path, "RGB", size), _read(map_path, "L", size)
        if classed.shape != pixels.shape[:2]:
            raise ValueError(f"{map_path} has size {classed.shape}, its image {pixels.shape[:2]}")
        found = table[classed]
        if (wrong := found == _OUTSIDE).any():
            raise ValueError(f"{map_path} has label {classed[wrong].max()}, outside {_listed(classes)}")
        if images is None or labels is None:  # one array from the beginning: a set can be as large as the memory
            images = np.empty((len(pairs), *pixels.shape), np.uint8)
            labels = np.empty((len(pairs), *classed.shape), label_dtype(max(classes.values())))
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"{path} has size {pixels.shape[:2]}, others in its folder {images.shape[1:3]}: give a size for all"
            )
        images[i], labels[i] = pixels, found
    if images is None or labels is None:
        raise ValueError("there are no pairs of images and label maps")
    return Split(images, labels)


def as_images(parts: Sequence[Split], classes: tuple[str, ...], *, where: Path) -> Images:
    """A set of its three splits, with the statistics of the first; ValueError where their sizes differ."""
    sizes = sorted({part.images.shape[1:3] for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"{where}: the splits have images of different sizes {sizes}")
    mean, std = channel_statistics(parts[0].images)
    train, validation, test = parts
    return Images(train, validation, test, classes, mean, std, ignored_label=IGNORED)


def label_dtype(largest: int) -> type[np.signedinteger]:
    """The smallest type of integers that holds classes up to this one, and `IGNORED`."""
    return np.int8 if largest <= np.iinfo(np.int8).max else np.int16


def _listed(classes: Mapping[int, int]) -> str:
    values = sorted(classes)
    if values == list(range(len(values))):
        return f"0..{values[-1]}"
    if values[:-1] == list(range(len(values) - 1)):
        return f"0..{values[-2]} and {values[-1]}"
    return ", ".join(map(str, values))


def _read(path: Path, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """The pixels of an image of one mode."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images are decoded by pillow, which is missing: pip install pillow") from error
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            # A palette holds colours for display; the numbers behind it are the labels.
            if image.mode != mode and not (mode == "L" and image.mode == "P"):
                raise ValueError(f"{path} has mode {image.mode}, expected {mode}")
            if size is not None and (image.height, image.width) != tuple(size):
                how = Image.Resampling.BILINEAR if mode == "RGB" else Image.Resampling.NEAREST
                image = image.resize(size[::-1], how)
            return np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
