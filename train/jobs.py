"""From an experiment of any kind to a job: what `python -m train` runs."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import train.experiment
import train.nodes.experiment
from train.config import Experiment
from train.nodes.config import GraphExperiment

_PREPARE = {
    Experiment: train.experiment.prepare_job,
    GraphExperiment: train.nodes.experiment.prepare_job,
}

KINDS = tuple(_PREPARE)
"""Every kind of experiment."""


def prepare_job(
    experiment: Experiment | GraphExperiment,
    *,
    data_dir: Path | None,
    runs_dir: Path,
    overwrite: bool = False,
    resume_changed: bool = False,
) -> Callable[[Console], None]:
    """The experiment's job, everything about it checked, as `train.experiment.prepare_job` describes it."""
    return _PREPARE[type(experiment)](
        experiment, data_dir=data_dir, runs_dir=runs_dir, overwrite=overwrite, resume_changed=resume_changed
    )
