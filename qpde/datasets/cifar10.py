"""CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of 32 by 32 pixels in ten classes, from the binary files."""

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from qpde.datasets.containers import Images, Split, channel_statistics, find_folder, stratified_parts

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS = 10_000
RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes, row by row


def load_cifar10(
    root: str | PathLike[str],
    *,
    batches: Sequence[int] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Images:
    """Read CIFAR-10 from its standard binary files, data_batch_1.bin .. data_batch_5.bin and test_batch.bin.

    Args:
      root: the folder with the files, or one that holds it as cifar-10-batches-bin or cifar10/cifar-10-batches-bin.
      batches: which training files to read, numbers from 1 to 5. By default all that are there; a warning is logged
        if that is fewer than five.
      validation_fraction: share of the training images held out, in [0, 1), stratified by class.
      seed: Seed of the choice of these images.
    Returns:
      `Images` of 32 x 32 x 3. The test split is the whole test file; mean and std are those of the training split.
    Raises:
      FileNotFoundError: no such folder, no training file, a requested one or the test file missing.
      ValueError: a file of the wrong size, a label outside 0..9, a bad `batches` or `validation_fraction`.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"`validation_fraction` (={validation_fraction}) must lie in [0, 1)")
    folder = find_folder(
        Path(root),
        (".", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
        "*_batch*.bin",
        what="CIFAR-10",
        source="https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)",
    )
    read = [_read_batch(path) for path in _training_files(folder, batches)]
    test = _read_batch(folder / "test_batch.bin")

    images = np.concatenate([split.images for split in read])
    labels = np.concatenate([split.labels for split in read])
    held_out = round(validation_fraction * len(labels))
    parts = stratified_parts(labels, (len(labels) - held_out, held_out), seed=seed)
    train, validation = (Split(images[part], labels[part]) for part in parts)
    mean, std = channel_statistics(train.images)
    return Images(train=train, validation=validation, test=test, classes=CLASSES, mean=mean, std=std)


def _training_files(folder: Path, batches: Sequence[int] | None) -> list[Path]:
    if batches is not None:
        if not batches or len(set(batches)) < len(batches) or not set(batches) <= set(range(1, 6)):
            raise ValueError(f"`batches` (={batches}) must be different numbers from 1 to 5")
        return [folder / f"data_batch_{number}.bin" for number in batches]
    files = [path for number in range(1, 6) if (path := folder / f"data_batch_{number}.bin").exists()]
    if not files:
        raise FileNotFoundError(f"no training images: {folder} has none of data_batch_1.bin to data_batch_5.bin")
    if len(files) < 5:
        logging.getLogger(__name__).warning(
            "CIFAR-10: %d of 5 training files in %s (%s), so %d images",
            len(files), folder, ", ".join(path.name for path in files), RECORDS * len(files),
        )  # fmt: skip
    return files


def _read_batch(path: Path) -> Split:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    found, expected = path.stat().st_size, RECORDS * RECORD_BYTES
    if found != expected:
        raise ValueError(
            f"{path} has {found:,} bytes, expected {expected:,} ({RECORDS:,} records of {RECORD_BYTES:,}): "
            "the file is damaged or is not the binary version; fetch it again"
        )
    records = np.fromfile(path, np.uint8).reshape(RECORDS, RECORD_BYTES)
    labels = records[:, 0]
    if labels.max() > 9:
        record = int(np.argmax(labels > 9))
        raise ValueError(f"{path}: record {record} has label {labels[record]}, outside 0..9")
    planes = records[:, 1:].reshape(RECORDS, 3, 32, 32)
    return Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels.astype(np.int32))
