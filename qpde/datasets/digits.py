"""Scikit-learn's handwritten digits (Alpaydin and Kaynak, 1998), which come with that package: the data of the demo."""

import numpy as np

from qpde.datasets.containers import (
    Images,
    NodeGraph,
    SparseRows,
    Split,
    channel_statistics,
    random_split,
    stratified_parts,
)

# Of 1797: ten full batches of 128 to train on; the others split so that one test image weighs a third of a percent.
SIZES = (1280, 197, 320)


def load_digits(*, size: int = 16, seed: int = 0) -> Images:
    """The 1797 digits as images of one channel: 1280 to train, 197 to validate, 320 to test, stratified by class.

    The original 8 x 8 images have 17 grey levels. They are enlarged by linear interpolation between pixel centres and
    stored with white at 255. At 16 a net with three stages still has 4 x 4 pixels in the last one.

    Args:
      size: side of the images, 8, 16 or 32.
      seed: Seed of the split.
    Returns:
      `Images` of size x size x 1, classes "0" to "9".
    Raises:
      ValueError: another `size`.
      ImportError: scikit-learn is missing.
    """
    if size not in (8, 16, 32):
        raise ValueError(f"`size` (={size}) must be 8, 16 or 32")
    pixels, labels = _read_digits()
    images = np.round(_enlarge(pixels, size) * (255 / 16)).astype(np.uint8)[..., None]
    train, validation, test = (Split(images[part], labels[part]) for part in stratified_parts(labels, SIZES, seed=seed))
    mean, std = channel_statistics(train.images)
    classes = tuple(str(digit) for digit in range(10))
    return Images(train=train, validation=validation, test=test, classes=classes, mean=mean, std=std)


def load_digits_graph(*, neighbours: int = 8, labels_per_class: int = 20, seed: int = 0) -> NodeGraph:
    """The digits as nodes of a graph: each is joined with its nearest neighbours, few have a known label.

    Two digits share an edge if either is among the `neighbours` nearest of the other (Euclidean distance of the 64
    pixels, ties to the lower index). The split has `labels_per_class` training nodes of each class, 500 validation and
    1000 test nodes, as the citation graphs have.

    Args:
      neighbours: per node, 1 to 1796.
      labels_per_class: training nodes of each class.
      seed: Seed of the split.
    Returns:
      `NodeGraph` with 1797 nodes; features are the pixels in [0, 1].
    Raises:
      ValueError: `neighbours` out of range, or more training labels than there are.
      ImportError: scikit-learn is missing.
    """
    pixels, labels = _read_digits()
    points = pixels.reshape(len(labels), -1)
    if not 1 <= neighbours < len(points):
        raise ValueError(f"`neighbours` (={neighbours}) must lie between 1 and {len(points) - 1}")
    # Pixels are small integers, so these squared distances are exact and ties are real ties.
    squares = np.sum(points**2, axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
    pairs = np.stack([np.repeat(np.arange(len(points)), neighbours), nearest.ravel()], axis=1)
    edges = np.unique(np.sort(pairs, axis=1), axis=0).astype(np.int32)

    row, column = np.nonzero(points)
    values = (points[row, column] / 16).astype(np.float32)
    nobody = np.empty(0, np.int32)
    graph = NodeGraph(
        senders=edges[:, 0],
        receivers=edges[:, 1],
        features=SparseRows(row.astype(np.int32), column.astype(np.int32), values),
        labels=labels,
        train=nobody,
        validation=nobody,
        test=nobody,
        num_features=points.shape[1],
        num_classes=10,
    )
    return random_split(graph, seed=seed, labels_per_class=labels_per_class)


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels 0..16 as float64 (1797, 8, 8) and labels."""
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'qpde[train]'") from error
    bunch = read()
    return bunch.images, bunch.target.astype(np.int32)


def _enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation along both axes, pixel centres at half integers, border pixels continued."""
    side = images.shape[-1]
    centres = (np.arange(size) + 0.5) * side / size - 0.5
    weights = np.stack([np.interp(centres, np.arange(side), row) for row in np.eye(side)], axis=1)
    return weights @ images @ weights.T
