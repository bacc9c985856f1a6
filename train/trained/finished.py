"""The networks of a finished run, and the images to measure them on."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import qpde
from qpde.bits import Bits
from qpde.measure.faithfulness import reestimate_statistics
from qpde.models.images.network import Network
from train.config.images import Experiment
from train.data.batches import STATISTICS_BATCHES, in_network_form, training_batches
from train.data.load import load_images
from train.data.resident import ImageSet, make_vary
from train.runs.directory import SUMMARY, read_experiment

__all__ = ["Finished", "check_data", "read_finished", "traced"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A trained variant with the images of its run.

    Attributes:
      name: Its name.
      network: The network as the run evaluated it.
      images: The images of the run.
      experiment: Configuration of the run.
    """

    name: str
    network: qpde.TrainedNetwork
    images: ImageSet
    experiment: Experiment

    @property
    def model(self) -> Network:
        """The network's module."""
        assert isinstance(self.network.model, Network), "a run on images has image networks"
        return self.network.model

    @property
    def variables(self) -> dict[str, Any]:
        """The network's collections."""
        return dict(self.network.variables)

    def at(self, bits: Bits) -> dict[str, Any]:
        """The variables with the batch statistics of these bits, which are estimated once."""
        bits = traced(bits)
        key = repr([None if part is None else np.asarray(part).tolist() for part in bits])
        if key not in self._at:
            self._at[key] = reestimate_statistics(self.model, self.variables, self.statistics_batches(), bits)
        return self._at[key]

    @cached_property
    def _at(self) -> dict[str, dict[str, Any]]:
        return {}

    def check_levels(self, bits: Iterable[int]) -> None:
        """ValueError for bits that the network's set of levels does not have."""
        levels = self.model.options.levels
        missing = [b for b in bits if 8 < b < 16]
        if levels != "uniform" and missing:
            raise ValueError(f"levels {levels!r} have no {missing[0]} bits: choose 2 to 8, or 16 and more")

    def test_images(self, limit: int | None = None) -> Iterator[tuple[Array, Array]]:
        """(network input, labels) of the first test images, batch by batch. None is all of them."""
        left = limit
        for x, labels in in_network_form(self.images):
            yield x[:left], labels[:left]
            if left is not None:
                left -= len(x)
                if left <= 0:
                    return

    def statistics_batches(self) -> Iterator[tuple[Array, Array]]:
        """What batch statistics are estimated from again."""
        return self.training_batches(limit=STATISTICS_BATCHES)

    def training_batches(self, *, limit: int) -> Iterator[tuple[Array, Array]]:
        """The first training batches, varied as in training."""
        return training_batches(self.images, self._vary, seed=self.experiment.seed, limit=limit)

    @cached_property
    def _vary(self):
        return jax.jit(make_vary(self.experiment.data, self.images))


def traced(bits: Bits) -> Bits:
    """The bits as arrays, so that one compiled program serves all of them; None stays None."""
    return Bits(*(None if part is None else jnp.asarray(part, jnp.int32) for part in bits))


def read_finished(run: Path, data_dir: Path | None) -> dict[str, Finished]:
    """Read the variants of a finished run on images, and its images.

    Args:
      run: Folder of the run.
      data_dir: Root of the data. None takes the environment's.
    Raises:
      FileNotFoundError: No such run, or it is not finished.
      ValueError: A run on a graph, a damaged network, or other images than those of the run.
    """
    experiment = read_experiment(run)
    if not (run / SUMMARY).is_file():
        raise FileNotFoundError(f"{run} holds no finished run: it has no {SUMMARY}; the command that began it goes on")
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{run} is a run on a graph: its summary.json holds what was measured; give one on images")
    networks = {variant.name: qpde.load(run / variant.name) for variant in experiment.chosen}
    images = load_images(experiment.data, data_dir, batch_size=experiment.batch_size, workers=experiment.workers)
    check_data(run, images.fingerprint, networks.values())
    return {name: Finished(name, network, images, experiment) for name, network in networks.items()}


def check_data(run: Path, fingerprint: str, networks: Iterable[qpde.TrainedNetwork]) -> None:
    """ValueError where networks of a run were trained on other data than those of this fingerprint."""
    for network in networks:
        trained_on = network.about.get("data_fingerprint")
        if trained_on != fingerprint:
            raise ValueError(
                f"{run} was trained on other data: those found as {network.about.get('data')!r} have fingerprint "
                f"{fingerprint[:12]}, not {str(trained_on)[:12]}. Give the --data-dir that it was trained with, or "
                "train again"
            )
