"""python docs/camvid_crops.py CAMVID OUT

Cuts labelled squares out of the road scenes of CamVid, by its label maps: OUT/train/tree/000123.png and so
on, in folders train, val and test, for `python -m train run configs/own_pictures.py --data.name folder/OUT`.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from qpde.datasets import load_camvid

CLASSES = ("building", "car", "pavement", "road", "sky", "tree")
SIDE = 32
PURE = 0.75
"""Share of a square's pixels that belong to its class."""


def cut(camvid: Path, out: Path, *, most: int = 300) -> None:
    """Write the squares.

    Args:
      camvid: Folder of CamVid.
      out: Folder to write.
      most: Squares of a class in each part; they are taken evenly from all that there are.
    """
    scenes = load_camvid(camvid)
    for part, split in (("train", scenes.train), ("val", scenes.validation), ("test", scenes.test)):
        images, labels = _tiles(split.images), _tiles(split.labels[..., None])[..., 0]
        for name in CLASSES:
            shares = (labels == scenes.classes.index(name)).mean((1, 2))
            found = np.flatnonzero(shares >= PURE)
            chosen = found[np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]
            folder = out / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in chosen:
                Image.fromarray(images[number]).save(folder / f"{number:06}.png")
            print(f"{part:5} {name:9} {len(chosen)}")


def _tiles(maps: np.ndarray) -> np.ndarray:
    """(N, H, W, C) cut into squares (M, SIDE, SIDE, C), what is left over at the borders dropped."""
    n, height, width, channels = maps.shape
    rows, columns = height // SIDE, width // SIDE
    maps = maps[:, : rows * SIDE, : columns * SIDE].reshape(n, rows, SIDE, columns, SIDE, channels)
    return maps.swapaxes(2, 3).reshape(-1, SIDE, SIDE, channels)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
