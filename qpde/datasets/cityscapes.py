"""Cityscapes (Cordts et al., 2016): road scenes of 50 cities, 19 classes to train on."""

from os import PathLike
from pathlib import Path

import numpy as np

from qpde.batches import IGNORED
from qpde.datasets.containers import Images, Split, find_folder
from qpde.datasets.label_maps import as_images, find_pairs, read_pairs

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABELS = dict.fromkeys(range(34), IGNORED) | {value: k for k, value in enumerate(_LABEL_IDS)}
"""Class of every value of the maps gtFine_labelIds; `IGNORED` for those that are not trained on."""


def load_cityscapes(
    root: str | PathLike[str], *, size: tuple[int, int] | None = None, validation: float = 0.1
) -> Images:
    """Read Cityscapes from its own folders.

        leftImg8bit/train/CITY/NAME_leftImg8bit.png    gtFine/train/CITY/NAME_gtFine_labelIds.png    val/...

    The test images have no public labels. So the images of "val" are those to test on, and a share of the training
    images, the last cities by name, is held out to choose the best epoch.

    Args:
      root: The folder that holds these two, or one that holds it as cityscapes.
      size: Height and width that everything is resized to. Default: 1024 x 2048, as it is, 25 GB in memory.
      validation: Share of the training images that are held out, above 0 and at most 0.5.
    Returns:
      `Images` with a label map for each image, sorted by city and name: 0..18 as in `CLASSES`, and `IGNORED`.
    Raises:
      FileNotFoundError: A folder, an image or a label map is missing.
      ValueError: A file that is no image, images of different sizes, a label above 33, fewer than 2 training images.
      ImportError: Pillow is missing.
    """
    folder = find_folder(
        Path(root), (".", "cityscapes"), "leftImg8bit", what="Cityscapes", source="https://www.cityscapes-dataset.com"
    )

    def pairs(part):
        labels = folder / "gtFine" / part
        if not labels.is_dir():
            raise FileNotFoundError(f"{labels} is missing: it holds the label maps, NAME_gtFine_labelIds.png")
        return find_pairs(folder / "leftImg8bit" / part, labels, ending=("_leftImg8bit", "_gtFine_labelIds"))

    train, held_out = split_train(read_pairs(pairs("train"), LABELS, size=size), validation, where=folder)
    return as_images([train, held_out, read_pairs(pairs("val"), LABELS, size=size)], CLASSES, where=folder)


def split_train(split: Split, validation: float, *, where: str | Path) -> tuple[Split, Split]:
    """The training images without a share of them, and that share: the last ones, neighbours in their sequences.

    Args:
      split: Images and label maps in the order of their names.
      validation: The share.
      where: What messages call them.
    Raises:
      ValueError: Fewer than 2 images.
    """
    count = len(split.images)
    if count < 2:
        raise ValueError(f"{where}: {count} training images leave none for validation")
    held = min(count - 1, max(1, round(validation * count)))
    return Split(*(part[:-held] for part in split)), Split(*(part[-held:] for part in split))


def classes_of_ids(label_ids: np.ndarray, *, where: str) -> np.ndarray:
    """Classes of a map of Cityscapes' label ids, int8; ValueError for one above 33."""
    if label_ids.max() > max(LABELS):
        raise ValueError(f"{where} has label {label_ids.max()}, outside 0..{max(LABELS)}")
    return np.array([LABELS[value] for value in sorted(LABELS)], np.int8)[label_ids]
