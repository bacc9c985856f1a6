"""From an experiment of any kind to a job: what `python -m train run` and `reproduce` do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import train.tasks.images
import train.tasks.nodes
import train.tasks.segmentation
from qpde import native
from train.config.graphs import GraphExperiment
from train.config.images import Experiment
from train.config.segmentation import SegmentationExperiment
from train.host.device import device_line
from train.host.distributed import is_first
from train.runs.directory import RunDirectory, open_run

_TASKS: dict[type, Callable[..., tuple[Any, Any]]] = {
    Experiment: train.tasks.images.trainings_of,
    SegmentationExperiment: train.tasks.segmentation.trainings_of,
    GraphExperiment: train.tasks.nodes.trainings_of,
}


def prepare_job(
    experiment: Experiment | GraphExperiment,
    *,
    data_dir: Path | None,
    runs_dir: Path,
    overwrite: bool = False,
    resume_changed: bool = False,
    tensorboard: bool = False,
    elsewhere: str = "--name",
    check: Callable[[Any], None] = lambda training: None,
) -> "Job":
    """Everything that can be wrong with an experiment is found here, before the first file is written.

    Args:
      experiment: What to do.
      data_dir: Root of the data, for data sets in files. None takes the environment's.
      runs_dir: Folder of the runs' folders. The run's is made in it, or taken up if it holds this experiment.
      overwrite: Delete what the run's folder holds.
      resume_changed: Take it up though the experiment differs.
      tensorboard: Write TensorBoard's events, too.
      elsewhere: The command's option that chooses another folder, for messages.
      check: What else each training has to pass before the folder is made; raises otherwise.
    Raises:
      ValueError, OSError: the experiment, the data or the folder are unusable; nothing was written.
      ImportError: a package is missing.
    """
    if jax.process_count() > 1 and not isinstance(experiment, Experiment):
        raise ValueError(f"{experiment.name} trains on one graph, which several processes cannot share: start one")
    trainings, report = _TASKS[type(experiment)](experiment, data_dir)
    for training in trainings.values():
        check(training)
    run = open_run(
        runs_dir,
        experiment,
        overwrite=overwrite,
        resume_changed=resume_changed,
        tensorboard=tensorboard,
        elsewhere=elsewhere,
    )
    return Job(trainings, report, run)


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked experiment with the folder that it holds.

    Attributes:
      trainings: by variant, (run, console) -> its results; trains, or goes on with training.
      report: (run, results by variant, console); closes the run.
      run: the folder.
    """

    trainings: dict[str, Callable[[RunDirectory, Console], dict[str, Any]]]
    report: Callable[[RunDirectory, dict[str, dict[str, Any]], Console], None]
    run: RunDirectory

    def __call__(self, console: Console) -> None:
        """Train and evaluate the variants, and write the report; progress and table go to `console`.

        Raises:
          FloatingPointError: training broke down.
          Interrupted: by SIGTERM or SIGINT, after the state was saved.
          CheckpointError: the saved state is of another network.
          DataError: an image cannot be read.
        """
        with self.run as run:
            console.print(device_line(), markup=False, highlight=False, soft_wrap=True)
            if jax.default_backend() == "cpu":
                console.print(native.describe(), markup=False, highlight=False, soft_wrap=True)
            for change in run.changes:
                console.print(f"resumed with {change}", markup=False, highlight=False, soft_wrap=True)
            results = {name: training(run, console) for name, training in self.trainings.items()}
            if is_first():
                self.report(run, results, console)
