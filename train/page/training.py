"""The section with the curves of trainings, from their lines of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qpde import plots
from train.page.html import Picture, figure

_QUANTITIES = (
    ("training-loss", "Training loss", "mean of the epoch", "train_loss", 1),
    ("validation-loss", "Validation loss", "cross entropy", "validation_loss", 1),
    ("validation-accuracy", "Validation accuracy", "%", "validation_accuracy", 100),
    ("validation-iou", "Validation mean IoU", "%", "validation_mean_iou", 100),
)


def section(
    lines: Mapping[str, Sequence[Mapping[str, Any]]], best: Mapping[str, Any], among: Sequence[str]
) -> str | None:
    """HTML: losses and accuracy against the epoch, as far as they were logged; None where nothing was.

    Args:
      lines: By network, its lines of metrics.jsonl. Lists over seeds are shown by their mean.
      best: By network, the epoch whose weights were kept, or None.
      among: All networks of the page.
    """
    pictures = []
    marked = {name: epoch for name, epoch in best.items() if isinstance(epoch, int | float)}
    for file, heading, unit, key, factor in _QUANTITIES:
        curves = {name: _curve(own, key, factor) for name, own in lines.items()}
        curves = {name: curve for name, curve in curves.items() if len(curve[0])}
        if curves:
            drawing = plots.over_time_figure(curves, heading=heading, unit=unit, marked=marked, among=among)
            ends = ", ".join(f"{name} {values[0]:.3g} to {values[-1]:.3g}" for name, (_, values) in curves.items())
            pictures.append(Picture(file, drawing, f"{heading} by epoch: {ends}."))
    if not pictures:
        return None
    caption = (
        "What the run logged after each epoch. A mark is the epoch whose weights were kept, the best by validation."
    )
    return figure(pictures, caption)


def _curve(lines, key, factor) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the lines that hold a number there."""
    found = [(line["epoch"], factor * value) for line in lines if (value := _mean(line.get(key))) is not None]
    epochs, values = np.array(found, np.float64).reshape(-1, 2).T
    return epochs, values


def _mean(value: Any) -> float | None:
    try:
        mean = float(np.mean(np.asarray(value, np.float64)))
    except (TypeError, ValueError):
        return None
    return mean if np.isfinite(mean) else None
