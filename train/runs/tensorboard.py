"""The lines of metrics.jsonl as TensorBoard's events, one folder a variant: `tensorboard --logdir RUN/tensorboard`."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "tensorboard"

_NO_METRICS = ("variant", "epoch", "step")


class Board:
    """Events below a folder.  Nothing is written before the first line.

    Args:
      folder: gets a folder for each variant.
    Raises:
      ImportError: tensorboardX, which writes them without TensorFlow, is missing.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("--tensorboard needs tensorboardX: install the [tensorboard] extra") from error
        self._folder, self._make = folder, SummaryWriter
        self._writers: dict[str, Any] = {}

    def restart(self, variant: str, lines: Iterable[dict[str, Any]]) -> None:
        """Replace what there is of a variant by these lines: of an interrupted run, those that it goes on from."""
        if variant in self._writers:
            self._writers.pop(variant).close()
        shutil.rmtree(self._folder / variant, ignore_errors=True)
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Its numbers at its epoch; of a list, as of many seeds, the mean."""
        variant = line["variant"]
        if variant not in self._writers:
            self._writers[variant] = self._make(logdir=str(self._folder / variant))
        for name, value in line.items():
            if name not in _NO_METRICS and isinstance(value, int | float | np.number | list):
                self._writers[variant].add_scalar(name, float(np.nanmean(np.asarray(value, np.float64))), line["epoch"])
        self._writers[variant].flush()

    def close(self) -> None:
        """Ends the files."""
        for writer in self._writers.values():
            writer.close()
