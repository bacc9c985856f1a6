"""Many trainings in one compiled step: cells of a sweep, which differ in their seeds and bits, vmapped.

Each keeps its own run directory, checkpoints, metrics and best state, as if it were trained alone, and is taken up from
them after an interruption; only the steps are shared. Trained alone, its sums are taken in another order, which
training magnifies as it does a change of machine.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from train.config.images import Experiment
from train.config.segmentation import SegmentationExperiment
from train.data.load import load_images
from train.host.console import Display
from train.host.interrupt import Interrupted, StopRequest
from train.loop import Progress
from train.runs.checkpoints import Checkpoints
from train.runs.directory import RunDirectory, open_run
from train.steps.state import TrainState
from train.tasks.images import ImagePlan, Training, trainings_on
from train.tasks.segmentation import SegmentationTraining

_KINDS = {Experiment: Training, SegmentationExperiment: SegmentationTraining}


def prepare_lockstep(
    cells: Sequence[Experiment], *, data_dir: Path | None, runs_dir: Path
) -> Callable[[Console], None]:
    """The job that trains and evaluates the cells together, everything about them checked.

    Args:
      cells: Experiments that differ in name, seed and the bits of their variants alone.
      data_dir: Root of the data, see `train.tasks.job.prepare_job`.
      runs_dir: Folder of the runs' folders, see there.
    Raises:
      ValueError, OSError: as there, or several devices are to share a batch; nothing was written.
    """
    if cells[0].devices != 1 or jax.process_count() > 1:
        raise ValueError(f"devices (={cells[0].devices}) must be 1 where runs are trained together: --at-once 1")
    images = load_images(cells[0].data, data_dir, batch_size=cells[0].batch_size, workers=cells[0].workers)
    prepared = [trainings_on(images, cell, _KINDS[type(cell)]) for cell in cells]
    runs = [open_run(runs_dir, cell) for cell in cells]

    def work(console: Console) -> None:
        with contextlib.ExitStack() as held:
            for run in runs:
                held.enter_context(run)
            results: list[dict[str, Any]] = [{} for _ in cells]
            for variant in prepared[0][0]:
                members = [trainings[variant] for trainings, _ in prepared]
                for own, member, run, state in zip(
                    results, members, runs, fit_together(members, runs, console), strict=True
                ):
                    own[variant] = member.results(state, run)
            for own, (_, report), run in zip(results, prepared, runs, strict=True):
                report(run, own, console)

    return work


def fit_together(members: Sequence[Training], runs: Sequence[RunDirectory], console: Console) -> list[TrainState]:
    """`Training.fit` of each, with the first one's images and compiled programs."""
    leader = members[0]
    plans = [ImagePlan(member, traced=True, leader=leader) for member in members]
    with contextlib.ExitStack() as open_, StopRequest() as stop:
        kept = [open_.enter_context(Checkpoints(run.checkpoints(leader.variant.name))) for run in runs]
        done = sum(checkpoints.last_step for checkpoints in kept)
        steps = sum(plan.epochs * plan.steps_per_epoch for plan in plans)
        display = open_.enter_context(Display(console, leader.variant.name, steps=steps, done=done))
        trainings = [
            Progress(member.first_state(), plan, run=run, checkpoints=checkpoints, display=display)
            for member, plan, run, checkpoints in zip(members, plans, runs, kept, strict=True)
        ]
        together = Together(leader.step)
        while left := [training for training in trainings if not training.ended]:
            batches = [training.next_batch() for training in left]
            for training, after in zip(left, together(left, batches), strict=True):
                training.take(*after)
            _save_what_is_due(left, stop)
        return [training.best(stop) for training in trainings]


def _save_what_is_due(trainings: Sequence[Progress], stop: StopRequest) -> None:
    """`Progress.save_what_is_due` of each: a signal is obeyed when all have saved their states."""
    interrupted: Interrupted | None = None
    for training in trainings:
        try:
            training.save_what_is_due(stop)
        except Interrupted as error:
            interrupted = error
    if interrupted:
        raise interrupted


class Together:
    """The next steps of several trainings as one vmapped program.

    Attributes:
      program: (states, totals, bits, batch, is_shared) -> states and totals, compiled once for each
        number of trainings.
    """

    def __init__(self, step: Callable):
        """Of `step`: (state, totals, bits, *batch) -> (state, totals), of `train.steps.train_step.make_epoch_step`."""

        @partial(jax.jit, static_argnames="is_shared", donate_argnums=0)
        def program(states, totals, bits, batch, is_shared):
            axes = [None if one else 0 for one in is_shared]
            batch = [part if one else _stack(part) for one, part in zip(is_shared, batch, strict=True)]
            found = jax.vmap(step, in_axes=(0, 0, 0, *axes))(_stack(states), _stack(totals), _stack(bits), *batch)
            return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(states))]

        self.program = program

    def __call__(self, trainings: Sequence[Progress], batches: Sequence[tuple]) -> list[tuple]:
        states = [training.state for training in trainings]
        totals = [training.totals for training in trainings]
        bits = [jax.tree.map(np.int32, training.bits) for training in trainings]
        # What all take from the same place, such as all images, is not copied for each.
        parts = list(zip(*batches, strict=True))
        is_shared = tuple(all(own is part[0] for own in part) for part in parts)
        batch = [part[0] if one else part for one, part in zip(is_shared, parts, strict=True)]
        return self.program(states, totals, bits, batch, is_shared)


def _stack(trees: Sequence):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
