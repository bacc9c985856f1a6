"""Epochs: train, evaluate, log, save; and take up where an interrupted run was left, at any step.

What a step computes is determined by the state it starts from: the order of the images and every random draw follow
from the state's key and step.  So the position in the data is the step, and a run that was stopped at any step and
goes on from its checkpoint ends with the same parameters and the same metrics as one that was never stopped, bit for
bit on the same machine.  A checkpoint therefore holds the state and the sums of the epoch so far, nothing else.
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import jax

from qpde.bits import Bits
from train.host.console import Display
from train.host.distributed import largest
from train.host.interrupt import Interrupted, StopRequest
from train.runs.checkpoints import Checkpoints
from train.runs.directory import RunDirectory
from train.steps.guards import SMALLEST_CLIP
from train.steps.state import TrainState

_NEAR_CHANCE = 1.1
"""Up to this multiple of the accuracy of guessing, a network has learned nothing."""

_KNOWN_SUMS = ("loss", "correct", "count", "collapsed_clips", "broken")

Scores = dict[str, Any]
"""{"accuracy", "loss"}, and what else there is to log."""


class Plan(Protocol):
    """The training of one variant, as the loop sees it."""

    @property
    def variant(self) -> str:
        """Its name."""

    @property
    def title(self) -> str:
        """What messages call the training."""

    @property
    def epochs(self) -> int:
        """Its length."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between saves; 0 saves at the end of epochs only."""

    @property
    def totals(self) -> Any:
        """Sums before the first batch of an epoch."""

    @property
    def chance(self) -> float:
        """Validation accuracy of guessing."""

    def bits(self, epoch: int) -> Bits:
        """Bits of an epoch, from 1 on: Python integers, or None where nothing is rounded."""

    def smoothing_scale(self, epoch: int) -> float | None:
        """Share of the full smoothing in an epoch, or None where that is not scheduled."""

    def enter(self, state: TrainState, epoch: int) -> TrainState:
        """State to begin an epoch with whose bits or smoothing are not those of the one before."""

    def batches(self, state: TrainState) -> Iterable[tuple]:
        """Arguments of `step`, from the step that the state stands at to the end of its epoch."""

    def step(self, state: TrainState, totals: Any, bits: Bits, *batch: Any) -> tuple[TrainState, Any]:
        """State and sums after one training step. It donates the state."""

    def evaluate(self, variables: dict[str, Any], bits: Bits) -> Scores:
        """Accuracy and loss on the validation set, and what else is to be logged."""

    def score(self, line: dict[str, Any]) -> Scores:
        """What the best epoch is chosen by, from a line of metrics."""

    def reached(self, line: dict[str, Any]) -> bool:
        """Whether training is to end with the epoch of that line."""

    def explain(self, state: TrainState, bits: Bits, *batch: Any) -> str:
        """What breaks down in the step from that state."""


def fit(state: TrainState, plan: Plan, *, run: RunDirectory, checkpoints: Checkpoints, display: Display) -> TrainState:
    """Train to the end of the last epoch and return the state of the best one among those like the last one.

    Each epoch ends with a line in metrics.jsonl, then a save.  SIGTERM and SIGINT end the current step and save.

    Args:
      state: First state. If the run has saved ones, only its shapes are used.
      plan: The training.
      run: Where it is logged.
      checkpoints: Where its states are saved.
      display: Where it says how far it is.
    Raises:
      Interrupted: By one of these signals; the state is saved.
      FloatingPointError: A step broke down; names it, the layer and the clips.  The states saved so far stay.
    """
    with StopRequest() as stop:
        training = Progress(state, plan, run=run, checkpoints=checkpoints, display=display)
        while not training.ended:
            batch = training.next_batch()
            training.take(*plan.step(training.state, training.totals, training.bits, *batch))
            training.save_what_is_due(stop)
        return training.best(stop)


class Progress:
    """How far a training is: its state and sums, and what is to be done before, between and after its steps.

    `fit` takes the steps of one training; `train.tasks.lockstep` those of several in one compiled call.

    Attributes:
      plan: The training.
      state: Its state after `step` steps.
      totals: Sums of the epoch so far.
      step: Steps done.
      ended: Whether there is no step left to do.
    """

    def __init__(self, state: TrainState, plan: Plan, *, run: RunDirectory, checkpoints: Checkpoints, display: Display):
        """Take up what was saved, or begin; see `fit` for the arguments."""
        self.plan, self.state, self.totals, self.step = plan, state, plan.totals, checkpoints.last_step
        self._run, self._checkpoints, self._display = run, checkpoints, display
        self._last = plan.epochs * plan.steps_per_epoch
        self._batches: Iterator[tuple] | None = None
        self._began = time.perf_counter()
        self.ended = self._last == 0
        if self.ended:
            return
        for folder in checkpoints.damaged:
            display.line(f"{plan.title}: a damaged checkpoint was set aside as {folder}")
        run.forget_after(plan.variant, self.step // plan.steps_per_epoch)
        if self.step:
            self.state, self.totals = checkpoints.load(self.step, (self.state, self.totals))
        if self.step or checkpoints.damaged:
            display.line(f"{plan.title}: going on after step {self.step} of {self._last}")
        self.ended = self.step == self._last or any(_ended(line, plan) for line in run.lines(plan.variant)[-1:])

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 1 on."""
        return self.step // self.plan.steps_per_epoch + 1

    @property
    def bits(self) -> Bits:
        """Bits of the next step."""
        return self.plan.bits(self.epoch)

    def next_batch(self) -> tuple:
        """The arguments of the next step; at the start of an epoch, enter it."""
        if self._batches is None:
            self._began = time.perf_counter()
            at_start = self.step % self.plan.steps_per_epoch == 0
            if at_start and self.epoch > 1 and not _alike(self.plan, self.epoch, self.epoch - 1):
                self.state = self.plan.enter(self.state, self.epoch)
            self._batches = iter(self.plan.batches(self.state))
        return next(self._batches)

    def take(self, state: TrainState, totals: Any) -> None:
        """The state and sums after a step; the last step of an epoch ends it."""
        before, self.state, self.totals = self.totals, state, totals
        # One step is prepared while one runs: further ahead, stopping would wait for all that is queued.
        jax.block_until_ready(before)
        self.step += 1
        self._display.step()
        if self.step % self.plan.steps_per_epoch == 0:
            self._end_epoch()

    def save_what_is_due(self, stop: StopRequest) -> None:
        """Save between steps where the plan or a signal asks for it.

        Raises:
          Interrupted: By a signal; the state is saved.
        """
        plan = self.plan
        due = plan.checkpoint_every and self.step % plan.checkpoint_every == 0
        stopped = largest(stop.signal_number or 0)  # a signal to one process ends the same step in all
        if self.step % plan.steps_per_epoch and (due or stopped):
            _check_finite(self.state, self.totals, plan)
            self._checkpoints.save(self.step, (self.state, self.totals))
        if stopped:
            raise Interrupted(
                f"interrupted: {plan.title} is saved after step {self.step} of {self._last}; the same command "
                "continues from there",
                stopped,
            )

    def best(self, stop: StopRequest) -> TrainState:
        """The state of the best epoch among those like the last one. Where its line was lost, it is validated again.

        Raises:
          Interrupted: By a signal during the evaluation of a training without steps; the state is saved.
        """
        plan = self.plan
        if self._last == 0:
            return self._evaluated(stop)
        best = self._checkpoints.best_step
        state, _ = self._checkpoints.load(best, (self.state, self.totals))
        if all(line["step"] != best for line in self._run.lines(plan.variant)):  # a crash of the machine can lose it
            _log_validated(state, plan, self._run, epoch=best // plan.steps_per_epoch)
        return state

    def _end_epoch(self) -> None:
        plan, epoch = self.plan, self.epoch - 1
        line = _line_of_epoch(self.state, self.totals, plan, epoch, began=self._began)
        self._run.log(**line)
        self._batches, self.totals = None, plan.totals
        final = _alike(plan, epoch, plan.epochs)
        self._checkpoints.save(self.step, (self.state, self.totals), plan.score(line) if final else None)
        at = "" if final else _at(plan.bits(epoch), plan.smoothing_scale(epoch))
        self._display.line(
            f"{plan.title}: epoch {epoch} of {plan.epochs}{at}, loss {line['train_loss']:.4g}, "
            f"validation accuracy {line['validation_accuracy']:.1%}, {line['seconds']:.1f} s"
        )
        self.ended = self.step == self._last or _ended(line, plan)
        for warning in _warnings(line, plan):
            self._display.line(f"{plan.title}: warning: {warning}")

    def _evaluated(self, stop: StopRequest) -> TrainState:
        """The state as it is, validated, logged and saved as if an epoch of no steps had led to it."""
        plan = self.plan
        self._run.forget_after(plan.variant, -1)
        validation = _log_validated(self.state, plan, self._run, epoch=0)
        self._checkpoints.save(0, (self.state, plan.totals), plan.score(_named(validation)))
        if stopped := largest(stop.signal_number or 0):
            raise Interrupted(f"interrupted: {plan.title} is saved; the same command continues from there", stopped)
        return self.state


def _alike(plan: Plan, epoch: int, other: int) -> bool:
    """Whether two epochs have the same bits and the same smoothing."""
    return (plan.bits(epoch), plan.smoothing_scale(epoch)) == (plan.bits(other), plan.smoothing_scale(other))


def _log_validated(state: TrainState, plan: Plan, run: RunDirectory, *, epoch: int) -> Scores:
    """Validate the state at the end of an epoch and log what can be said without its steps."""
    start, bits = time.perf_counter(), plan.bits(epoch)
    validation = plan.evaluate(state.averaged.variables, bits)
    run.log(
        variant=plan.variant,
        epoch=epoch,
        step=epoch * plan.steps_per_epoch,
        weight_bits=bits.weights,
        act_bits=bits.activations,
        **_named(validation),
        seconds=round(time.perf_counter() - start, 3),
    )
    return validation


def _line_of_epoch(state: TrainState, totals: Any, plan: Plan, epoch: int, *, began: float) -> dict[str, Any]:
    """The epoch's line of metrics."""
    _check_finite(state, totals, plan)
    bits, scale = plan.bits(epoch), plan.smoothing_scale(epoch)
    validation = plan.evaluate(state.averaged.variables, bits)
    if not math.isfinite(validation["loss"]):
        raise FloatingPointError(
            f"{plan.title}: the validation loss after epoch {epoch} is not finite though the training loss is: the "
            "batch statistics are far from the batches'; try a smaller --optimizer.learning-rate"
        )
    sums = jax.device_get(totals)
    return {
        "variant": plan.variant,
        "epoch": epoch,
        "step": epoch * plan.steps_per_epoch,
        "weight_bits": bits.weights,
        "act_bits": bits.activations,
        **({} if scale is None else {"smoothing_scale": scale}),
        "train_loss": float(sums["loss"] / sums["count"]),
        "train_accuracy": float(sums["correct"] / sums["count"]),
        **{f"train_{name}": float(value / sums["count"]) for name, value in sums.items() if name not in _KNOWN_SUMS},
        "collapsed_clips": int(sums["collapsed_clips"]),
        **_named(validation),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _named(validation: Scores) -> dict[str, Any]:
    """Scores on the validation set as a line of metrics has them."""
    return {f"validation_{name}": value for name, value in validation.items()}


def _ended(line: dict[str, Any], plan: Plan) -> bool:
    """Whether training ends with the line's epoch before its time; the line says so to a resumed run, too."""
    return _alike(plan, line["epoch"], plan.epochs) and plan.reached(line)


def _at(bits: Bits, smoothing_scale: float | None) -> str:
    weights, activations = ("32" if part is None else str(part) for part in bits)
    smoothing = "" if smoothing_scale is None else f" and {smoothing_scale:.0%} of the smoothing"
    return f" at {weights} and {activations} bits{smoothing}"


def _warnings(line: dict[str, Any], plan: Plan) -> list[str]:
    """What is suspicious about an epoch, though training can go on."""
    warnings = []
    if line["collapsed_clips"]:
        warnings.append(
            f"clips that fell below {SMALLEST_CLIP} and were raised to it: {line['collapsed_clips']}; try a smaller "
            "learning rate for clips (a rule of the optimizer)"
        )
    first_tenth = max(1, math.ceil(plan.epochs / 10))
    guess = _NEAR_CHANCE * plan.chance
    if line["epoch"] == first_tenth and max(line["validation_accuracy"], line["train_accuracy"]) <= guess:
        warnings.append(
            f"an accuracy of {line['validation_accuracy']:.1%} after a tenth of the run is that of guessing: try a "
            "smaller --optimizer.learning-rate, more bits or another --clip-start"
        )
    return warnings


def _check_finite(state, totals, plan: Plan) -> None:
    if totals["broken"]:
        step = int(state.step)
        epoch = step // plan.steps_per_epoch + 1
        why = plan.explain(state, plan.bits(epoch), *next(iter(plan.batches(state))))
        raise FloatingPointError(
            f"{plan.title}: step {step} (epoch {epoch}) broke down: {why}. Try a smaller "
            "--optimizer.learning-rate. Earlier checkpoints are kept"
        )
