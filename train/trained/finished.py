"""The networks of a finished run, ready to be looked at."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Array

from qpde.bits import Bits
from qpde.measure.faithfulness import reestimate_statistics
from train.config.images import Annealing, Experiment
from train.runs.directory import SUMMARY, read_experiment
from train.tasks.images import Training
from train.tasks.job import prepare_trainings


@dataclasses.dataclass(frozen=True)
class Finished:
    """A trained variant.

    Attributes:
      training: its network, images and configuration.   variables: the best state's, without the twin's clips.
    """

    training: Training
    variables: dict[str, Any]

    def at(self, bits: Bits) -> dict[str, Any]:
        """The variables with the batch statistics of these widths."""
        return reestimate_statistics(self.training.model, self.variables, self.training.statistics_batches(), bits)

    def check_levels(self, widths: Iterable[int]) -> None:
        """ValueError for a width that the network's set of levels does not have."""
        levels = self.training.experiment.model_of(self.training.variant).levels
        missing = [width for width in widths if 8 < width < 16]
        if levels != "uniform" and missing:
            raise ValueError(f"levels {levels!r} have no widths of {missing[0]} bits: choose 2 to 8, or 16 and more")

    def test_images(self, limit: int) -> Iterator[tuple[Array, Array]]:
        """(network input, labels) of the first test images, batch by batch."""
        for x, labels in self.training.test_images():
            yield x[:limit], labels[:limit]
            limit -= len(x)
            if limit <= 0:
                return


def read_finished(run: Path, data_dir: Path | None) -> dict[str, Finished]:
    """The best state of each variant of a run on images.

    Raises:
      FileNotFoundError: no finished run is there, or its data are not.
      ValueError: it is a run on a graph, or one that this version cannot read.
    """
    experiment = read_experiment(run)
    if not (run / SUMMARY).is_file():
        raise FileNotFoundError(f"{run} holds no finished run: it has no {SUMMARY}; the command that began it goes on")
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{run} is a run on a graph: its summary.json holds what was measured; give one on images")
    # The same networks, started from the run itself: so its folder, data and shapes are checked as anywhere else. What
    # was annealed is so no more.
    own = dataclasses.replace(experiment, start_from=str(run), calibration=None, epochs=0, annealing=Annealing())
    trainings, _ = prepare_trainings(dataclasses.replace(own, devices=1, accumulate=1), data_dir)
    return {name: Finished(training, training.first_state().variables) for name, training in trainings.items()}
