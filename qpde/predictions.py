"""Pictures in, predictions out: what the script `qpde predict` and `python -m train predict` have in common.

Pictures are turned upright, cut and resized as in the evaluation of the network's training. The twin is the network
with activations that are clipped and not rounded; a prediction is certified where the twin provably makes the same.
"""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qpde.bits import EXACT_BITS, Bits
from qpde.certify import certify, exact_twin, step_bounds
from qpde.certify.step_bounds import check_model
from qpde.models import converge_norms
from qpde.models.images.network import Network
from qpde.pictures import list_pictures, read_picture, shown
from qpde.trained import TrainedNetwork

__all__ = ["FORMATS", "Prediction", "Predictor", "predict_files"]

FORMATS = ("table", "csv", "jsonl")

_BATCH = 64
"""Pictures that are read and computed at once."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of one picture.

    Attributes:
      name: Name of the class.
      probability: Softmax of its logit.
      twin: The twin's class; None for a network that rounds no activations.
      certified: Whether the twin provably predicts the same; None where that was not asked for.
    """

    name: str
    probability: float
    twin: str | None = None
    certified: bool | None = None

    def values(self) -> dict[str, Any]:
        """The columns of a table, those that were asked for."""
        found = {"class": self.name, "probability": round(self.probability, 6), "twin": self.twin}
        return found if self.certified is None else found | {"certified": self.certified}


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained image network at some bits.

    Attributes:
      network: Result of `qpde.load`.
      bits: Its bits. Default: the network's own.
      certified: Whether to certify every prediction, which costs more than the prediction.
      newton_steps: Steps of Newton's method before the proof, None for the cheapest one; see `qpde.certify`.

    Raises:
      ValueError: A network on graphs, or one whose input is unknown; bits that it has no quantizers or no levels for;
        a certificate that is not possible.
    """

    network: TrainedNetwork
    bits: Bits | None = None
    certified: bool = False
    newton_steps: int | None = None

    def __post_init__(self):
        model, _ = self.model, self.shape
        for part, own, given in zip(Bits._fields, model.bits, self._bits, strict=True):
            if own is None and given is not None and given < EXACT_BITS:
                raise ValueError(f"this network has no quantizers of {part}: quantize it first, see qpde.ptq.quantize")
            if given is not None and 8 < given < EXACT_BITS and model.options.levels != "uniform":
                raise ValueError(f"levels {model.options.levels!r} have no {given} bits: choose 2 to 8, or 16 and more")
        if self.newton_steps is not None and self.newton_steps < 0:
            raise ValueError(f"newton steps (={self.newton_steps}) must be at least 0")
        if self.certified:
            if self._bits.activations is None or self._bits.activations >= EXACT_BITS:
                raise ValueError("nothing is rounded, so there is nothing to certify: give bits of activations")
            check_model(self._ordinary[0])

    @property
    def model(self) -> Network:
        """The network's module."""
        model = self.network.model
        if not isinstance(model, Network):
            raise ValueError("this network takes a graph, and pictures are none: use qpde.load(NETWORK).predict(graph)")
        return model

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what pictures are made into."""
        shape = self.network.input_shape
        if shape is None or shape[2] not in (1, 3):
            raise ValueError(
                f"this network takes inputs of shape {shape}, which pictures cannot be made into: save it with "
                "input_shape=(height, width, 3), or 1 for shades of grey"
            )
        return shape

    def __call__(self, images: np.ndarray) -> list[Prediction]:
        """Predict the classes of images.

        Args:
          images: uint8 (N, height, width, channels).
        """
        count = len(images)
        size = 1 << max(count - 1, 0).bit_length()  # few shapes, so that few programs are compiled
        images = np.concatenate([images, np.repeat(images[:1], size - count, axis=0)])
        logits, twin, proven = self._certified(images) if self.certified else self._plain(images)
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        chosen, share = logits.argmax(-1), shifted.max(-1) / shifted.sum(-1)
        classes = self.network.classes
        return [
            Prediction(
                classes[chosen[i]],
                float(share[i]),
                None if twin is None else classes[twin[i].argmax()],
                None if proven is None else bool(proven[i]),
            )
            for i in range(count)
        ]

    @property
    def _bits(self) -> Bits:
        """What the network runs at; a part that it cannot round stays without quantizers."""
        own = self.network.model.bits
        given = own if self.bits is None else self.bits
        return Bits(*(None if mine is None and bits >= EXACT_BITS else bits for mine, bits in _pairs(own, given)))

    def _plain(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, None]:
        bits = self._bits
        logits = self.network.logits(images, bits=bits)
        return logits, None if bits.activations is None else self.network.logits(images, bits=bits.twin), None

    def _certified(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        model, variables, steps = self._proof
        x, bits = self.network.normalize(images), self._ordinary[2]
        found = certify(model, variables, x, bits, newton_steps=self.newton_steps, steps=steps)
        return np.asarray(found.logits), exact_twin(model, variables, x, bits), np.asarray(found.certified)

    @cached_property
    def _ordinary(self) -> tuple[Network, dict[str, Any], Bits]:
        """The network with one clip for all bits."""
        model, variables, bits = self.model, dict(self.network.variables), self._bits
        if model.clip_bits is not None:
            model, variables = model.at_bits(variables, bits)
        return model, variables, Bits(*(None if value is None else jnp.int32(value) for value in bits))

    @cached_property
    def _proof(self) -> tuple[Network, dict[str, Any], Any]:
        """The network with converged norms, and the constants of its steps, which are the same for all pictures."""
        model, variables, bits = self._ordinary
        height, width, channels = self.shape
        variables = converge_norms(model, variables, jnp.zeros((1, height, width, channels)), bits=bits)
        return model, variables, step_bounds(model, variables, (height, width), bits)


def _pairs(own: Bits, given: Bits) -> Iterator[tuple[Any, Any]]:
    return ((mine, EXACT_BITS if bits is None else bits) for mine, bits in zip(own, given, strict=True))


def predict_files(
    predictors: Mapping[str, Predictor],
    files: Sequence[str | os.PathLike[str]],
    *,
    form: str = "table",
    out: Any = None,
    errors: Any = None,
) -> int:
    """Predict the class of every picture, and print a line for each.

    Args:
      predictors: By the name that each has in the output; a single one needs none. All take inputs of one shape.
      files: Pictures, and folders, of which all pictures below are taken.
      form: One of `FORMATS`.
      out: Text file where the lines go. Default: standard output.
      errors: Text file where files that cannot be read are named. Default: standard error.
    Returns:
      The exit status: 0, or 1 if a file could not be read; the others are predicted all the same.
    Raises:
      ValueError: Another form, or networks with inputs of different shapes.
      ImportError: Pillow is missing.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is none of {', '.join(FORMATS)}")
    seen = {(predictor.shape, predictor.network.centre) for predictor in predictors.values()}
    if len(seen) != 1:
        raise ValueError("the networks take inputs of different shapes: predict with one at a time")
    ((shape, centre),) = seen
    out, errors = out or sys.stdout, errors or sys.stderr
    paths, failed = list_pictures(files)
    for path in failed:
        print(f"error: {shown(path)} has no pictures below it", file=errors)
    write = _Writer(form, predictors, [shown(path) for path in paths], out)
    status = 1 if failed else 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            read = list(threads.map(lambda path: _read(path, shape, centre), batch))
            for path, pixels in zip(batch, read, strict=True):
                if isinstance(pixels, OSError):
                    status = 1
                    print(f"error: {shown(path)} cannot be read: {pixels.strerror or pixels}", file=errors)
            good = [(path, pixels) for path, pixels in zip(batch, read, strict=True) if not isinstance(pixels, OSError)]
            if good:
                images = np.stack([pixels for _, pixels in good])
                found = {name: predictor(images) for name, predictor in predictors.items()}
                for i, (path, _) in enumerate(good):
                    write.line(shown(path), {name: own[i] for name, own in found.items()})
            out.flush()
    return status


def _read(path: Path, shape: tuple[int, int, int], centre: float) -> np.ndarray | OSError:
    try:
        return read_picture(path, shape, centre=centre)
    except OSError as error:
        return error


class _Writer:
    """Lines of one form; of several networks each has columns of its own, or one cell of a table."""

    def __init__(self, form: str, predictors: Mapping[str, Predictor], files: Sequence[str], out: Any):
        self._form, self._out = form, out
        (first, *_), self._single = predictors.values(), len(predictors) == 1
        columns = ["class", "probability", "twin", *(["certified"] if first.certified else [])]
        name = max([5, *(len(name) for name in first.network.classes)])
        if self._single:
            header, widths = columns, [name, 11, name, 9]
        elif form == "table":
            header = list(predictors)
            cell = name + 7 + (len(" certified") if first.certified else 0)
            widths = [max(cell, len(label)) for label in header]
        else:
            header, widths = [f"{label}.{column}" for label in predictors for column in columns], []
        self._widths = [max([4, *map(len, files)]), *widths]
        self._csv = csv.writer(out)
        if form == "table" and files:
            self._row("file", *header)
        elif form == "csv":
            self._csv.writerow(["file", *header])

    def line(self, file: str, found: Mapping[str, Prediction]) -> None:
        """Write the predictions of a file, by the name of the network."""
        values = {name: own.values() for name, own in found.items()}
        if self._form == "jsonl":
            own = next(iter(values.values())) if self._single else values
            print(json.dumps({"file": file} | own), file=self._out)
        elif self._form == "csv":
            self._csv.writerow([file, *(_text(value) for own in values.values() for value in own.values())])
        elif self._single:
            (own,) = values.values()
            self._row(file, *(_text(value) for value in (own | {"probability": f"{own['probability']:.2%}"}).values()))
        else:
            self._row(file, *map(_cell, found.values()))

    def _row(self, *cells: str) -> None:
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=False))
        print("  ".join(padded).rstrip(), file=self._out)


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(found: Prediction) -> str:
    twin = "" if found.twin in (None, found.name) else f" (twin: {found.twin})"
    return f"{found.name} {found.probability:.1%}{' certified' if found.certified else ''}{twin}"
