"""Epochs: train, evaluate, log, save; and take up where an interrupted run was left."""

import time
from collections.abc import Callable
from typing import Any

import jax

from train.checkpoints import Checkpoints
from train.progress import Display
from train.rundir import RunDirectory
from train.state import TrainState
from train.step import empty_totals, epoch_order


def fit(
    state: TrainState,
    epoch_step: Callable,
    evaluate: Callable[[dict[str, Any]], dict[str, float]],
    train_split: tuple[jax.Array, jax.Array],
    *,
    variant: str,
    epochs: int,
    steps_per_epoch: int,
    run: RunDirectory,
    checkpoints: Checkpoints,
    display: Display,
) -> TrainState:
    """Trains to the end of the last epoch and returns the state of the best one.

    Each epoch ends with a line in metrics.jsonl, then a saved state: an interruption costs one epoch at most.

    Args:
      state: the first state; if the run has saved ones, only its shapes are used.
      epoch_step: of `make_epoch_step`.
      evaluate: variables -> {"accuracy", "loss"} on the validation images.
      train_split: images (n, H, W, C) uint8 and labels (n,) int32, on the device.
    Raises:
      FloatingPointError: a loss was not finite; names the step.  The states saved so far stay.
    """
    images, labels = train_split
    done = checkpoints.last_epoch
    run.forget_after(variant, done)
    if done:
        state = checkpoints.load(done, state)
        display.line(f"{variant}: going on after epoch {done} of {epochs}")
    for epoch in range(done + 1, epochs + 1):
        start = time.perf_counter()
        order = epoch_order(state, count=len(images), steps_per_epoch=steps_per_epoch)
        totals = empty_totals()
        for _ in range(steps_per_epoch):
            state, totals = epoch_step(state, totals, images, labels, order)
            display.step()
        totals = jax.device_get(totals)
        if totals["broken_step"] >= 0:
            raise FloatingPointError(
                f"{variant}: the loss of step {totals['broken_step']} (epoch {epoch}) is not finite; "
                "try a smaller --optimizer.learning-rate"
            )
        validation = evaluate(state.variables)
        seconds = time.perf_counter() - start
        run.log(
            variant=variant,
            epoch=epoch,
            step=epoch * steps_per_epoch,
            train_loss=float(totals["loss"] / totals["count"]),
            train_accuracy=float(totals["correct"] / totals["count"]),
            validation_loss=validation["loss"],
            validation_accuracy=validation["accuracy"],
            seconds=round(seconds, 3),
        )
        checkpoints.save(epoch, state, validation)
        display.line(
            f"{variant}: epoch {epoch} of {epochs}, loss {totals['loss'] / totals['count']:.4f}, "
            f"validation accuracy {validation['accuracy']:.1%}, {seconds:.1f} s"
        )
    return checkpoints.load(checkpoints.best_epoch, state)
