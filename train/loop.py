"""Epochs: train, evaluate, log, save; and take up where an interrupted run was left, at any step.

What a step computes is determined by the state it starts from: the order of the images and every random draw follow
from the state's key and step.  So the position in the data is the step, and a run that was stopped at any step and
goes on from its checkpoint ends with the same parameters and the same metrics as one that was never stopped, bit for
bit on the same machine.  A checkpoint therefore holds the state and the sums of the epoch so far, nothing else.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from train.checkpoints import Checkpoints
from train.interrupt import Interrupted, StopRequest
from train.progress import Display
from train.rundir import RunDirectory
from train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
    """The training of one variant.

    Attributes:
      variant: its name.
      epochs, steps_per_epoch: its length.
      checkpoint_every: steps between saves; 0 saves at the end of epochs only.
      step: (state, totals, *batch) -> (state, totals), as `make_epoch_step` makes it; donates the state.
      totals: sums before the first batch of an epoch.
      batches: state -> the arguments `batch` of the step that the state stands at, and of those that follow up to the
        end of its epoch.
      evaluate: variables -> {"accuracy", "loss"} on the validation images.
    """

    variant: str
    epochs: int
    steps_per_epoch: int
    checkpoint_every: int
    step: Callable[..., tuple[TrainState, Any]]
    totals: Any
    batches: Callable[[TrainState], Iterable[tuple]]
    evaluate: Callable[[dict[str, Any]], dict[str, float]]


def fit(state: TrainState, plan: Plan, *, run: RunDirectory, checkpoints: Checkpoints, display: Display) -> TrainState:
    """Trains to the end of the last epoch and returns the state of the best one.

    Each epoch ends with a line in metrics.jsonl, then a save.  SIGTERM and SIGINT end the current step and save.

    Args:
      state: the first state; if the run has saved ones, only its shapes are used.
    Raises:
      Interrupted: by one of these signals; the state is saved.
      FloatingPointError: a loss was not finite; names the step.  The states saved so far stay.
    """
    name, last = plan.variant, plan.epochs * plan.steps_per_epoch
    for folder in checkpoints.damaged:
        display.line(f"{name}: a damaged checkpoint was set aside as {folder}")
    step, totals = checkpoints.last_step, plan.totals
    run.forget_after(name, step // plan.steps_per_epoch)
    if step:
        state, totals = checkpoints.load(step, (state, totals))
    if step or checkpoints.damaged:
        display.line(f"{name}: going on after step {step} of {last}")

    with StopRequest() as stop:
        while step < last:
            epoch, start = step // plan.steps_per_epoch + 1, time.perf_counter()
            for batch in plan.batches(state):
                before = totals
                state, totals = plan.step(state, totals, *batch)
                # One step is prepared while one runs: further ahead, stopping would wait for all that is queued.
                jax.block_until_ready(before)
                step += 1
                display.step()
                due = plan.checkpoint_every and step % plan.checkpoint_every == 0
                if step % plan.steps_per_epoch and (due or stop.signal_number):
                    _check_finite(name, totals, epoch)
                    checkpoints.save(step, (state, totals))
                if stop.signal_number:
                    break
            if step % plan.steps_per_epoch == 0:
                line = _end_epoch(state, totals, plan, epoch, seconds=lambda start=start: time.perf_counter() - start)
                run.log(**line)
                validation = {"accuracy": line["validation_accuracy"], "loss": line["validation_loss"]}
                totals = plan.totals
                checkpoints.save(step, (state, totals), validation)
                display.line(
                    f"{name}: epoch {epoch} of {plan.epochs}, loss {line['train_loss']:.4f}, "
                    f"validation accuracy {line['validation_accuracy']:.1%}, {line['seconds']:.1f} s"
                )
            if stop.signal_number:
                raise Interrupted(
                    f"interrupted: {name} is saved after step {step} of {last}; the same command goes on from there",
                    stop.signal_number,
                )
    return checkpoints.load(checkpoints.best_step, (state, totals))[0]


def _end_epoch(state, totals, plan: Plan, epoch: int, *, seconds: Callable[[], float]) -> dict[str, Any]:
    """The epoch's line of metrics."""
    _check_finite(plan.variant, totals, epoch)
    validation = plan.evaluate(state.variables)
    sums = jax.device_get(totals)
    return {
        "variant": plan.variant,
        "epoch": epoch,
        "step": epoch * plan.steps_per_epoch,
        "train_loss": float(sums["loss"] / sums["count"]),
        "train_accuracy": float(sums["correct"] / sums["count"]),
        "validation_loss": validation["loss"],
        "validation_accuracy": validation["accuracy"],
        "seconds": round(seconds(), 3),
    }


def _check_finite(variant: str, totals, epoch: int) -> None:
    broken = int(totals["broken_step"])
    if broken >= 0:
        raise FloatingPointError(
            f"{variant}: the loss of step {broken} (epoch {epoch}) is not finite; "
            "try a smaller --optimizer.learning-rate"
        )
