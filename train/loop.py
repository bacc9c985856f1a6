"""Epochs: train, evaluate, log, save; and take up where an interrupted run was left, at any step.

What a step computes is determined by the state it starts from: the order of the images and every random draw follow
from the state's key and step.  So the position in the data is the step, and a run that was stopped at any step and
goes on from its checkpoint ends with the same parameters and the same metrics as one that was never stopped, bit for
bit on the same machine.  A checkpoint therefore holds the state and the sums of the epoch so far, nothing else.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

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

_STATISTICS_SETTLE = 100
"""Steps after which running batch statistics, which keep 0.9 of themselves a step, have forgotten their start and the
first large steps."""

_KNOWN_SUMS = ("loss", "correct", "count", "collapsed_clips", "broken")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The training of one variant.

    Attributes:
      variant: its name.   title: what messages call the training.
      epochs, steps_per_epoch: its length.
      checkpoint_every: steps between saves; 0 saves at the end of epochs only.
      bits: epoch, from 1 on -> its `Bits`, of Python integers or None.
      strength: epoch -> its strength of smoothing, or None where that is not scheduled.
      enter: (state, epoch) -> state, called before an epoch whose widths or strength are not those of the one before.
      step: (state, totals, bits, *batch) -> (state, totals), as `make_epoch_step` makes it; donates the state.
      totals: sums before the first batch of an epoch.
      batches: state -> the arguments `batch` of the step that the state stands at, and of those that follow up to the
        end of its epoch.
      evaluate: (variables, bits) -> {"accuracy", "loss", ...} on the validation images; all of them are logged.
      score: line of metrics -> {"accuracy", "loss"} by which the best epoch is chosen.
      reached: line of metrics -> whether training is to end with that epoch.
      explain: (state, bits, *batch) -> what breaks down in the step from that state.
      chance: validation accuracy of guessing.
    """

    variant: str
    title: str
    epochs: int
    steps_per_epoch: int
    checkpoint_every: int
    bits: Callable[[int], Bits]
    strength: Callable[[int], float | None]
    enter: Callable[[TrainState, int], TrainState]
    step: Callable[..., tuple[TrainState, Any]]
    totals: Any
    batches: Callable[[TrainState], Iterable[tuple]]
    evaluate: Callable[[dict[str, Any], Bits], dict[str, float]]
    score: Callable[[dict[str, Any]], dict[str, float]]
    reached: Callable[[dict[str, Any]], bool]
    explain: Callable[..., str]
    chance: float

    def alike(self, epoch: int, other: int) -> bool:
        """Whether two epochs have the same widths and the same strength of smoothing."""
        return (self.bits(epoch), self.strength(epoch)) == (self.bits(other), self.strength(other))


class Request(NamedTuple):
    """What a training asks for: the step from `state`, answered by the state and the sums after it. See `Plan.step`."""

    state: TrainState
    totals: Any
    bits: Bits
    batch: tuple


Course = Generator[Request, tuple[TrainState, Any], TrainState]
"""A training as a course of steps that somebody else carries out; it ends with the best state."""


def fit(state: TrainState, plan: Plan, *, run: RunDirectory, checkpoints: Checkpoints, display: Display) -> TrainState:
    """Trains to the end of the last epoch and returns the state of the best one among those like the last one.

    Each epoch ends with a line in metrics.jsonl, then a save.  SIGTERM and SIGINT end the current step and save.
    Where the best one's line was lost since, it is validated again.

    Args:
      state: the first state; if the run has saved ones, only its shapes are used.
    Raises:
      Interrupted: by one of these signals; the state is saved.
      FloatingPointError: a step broke down; names it, the layer and the clips.  The states saved so far stay.
    """
    with StopRequest() as stop:
        only = course(state, plan, run=run, checkpoints=checkpoints, display=display, stop=stop)
        return in_step([only], lambda requests: [plan.step(*requests[0][:3], *requests[0].batch)])[0]


def in_step(
    courses: Sequence[Course], step: Callable[[list[Request]], list[tuple[TrainState, Any]]]
) -> list[TrainState]:
    """Runs trainings side by side: `step` does the next step of all that have not ended, in one call.

    Raises:
      Interrupted: when each has saved its state.   FloatingPointError: one broke down; the others stop where they are.
    """
    found: dict[int, TrainState] = {}
    stopped: Interrupted | None = None
    answers: dict[int, Any] = dict.fromkeys(range(len(courses)))
    with contextlib.ExitStack() as closing:
        for one in courses:
            closing.callback(one.close)
        while answers:
            requests = {}
            for i, answer in answers.items():
                try:
                    requests[i] = courses[i].send(answer)
                except StopIteration as end:
                    found[i] = end.value
                except Interrupted as error:
                    stopped = error
            answers = dict(zip(requests, step(list(requests.values())), strict=True)) if requests else {}
    if stopped:
        raise stopped
    return [found[i] for i in range(len(courses))]


def course(
    state: TrainState,
    plan: Plan,
    *,
    run: RunDirectory,
    checkpoints: Checkpoints,
    display: Display,
    stop: StopRequest,
) -> Course:
    """`fit` without its steps: what to do before, between and after them."""
    name, last = plan.title, plan.epochs * plan.steps_per_epoch
    if last == 0:
        state = _evaluated(state, plan, run=run, checkpoints=checkpoints)
        if stopped := largest(stop.signal_number or 0):
            raise Interrupted(f"interrupted: {name} is saved; the same command goes on from there", stopped)
        return state
    for folder in checkpoints.damaged:
        display.line(f"{name}: a damaged checkpoint was set aside as {folder}")
    step, totals = checkpoints.last_step, plan.totals
    run.forget_after(plan.variant, step // plan.steps_per_epoch)
    if step:
        state, totals = checkpoints.load(step, (state, totals))
    if step or checkpoints.damaged:
        display.line(f"{name}: going on after step {step} of {last}")

    ended = any(_ended(line, plan) for line in run.lines(plan.variant)[-1:])
    while step < last and not ended:
        epoch, start = step // plan.steps_per_epoch + 1, time.perf_counter()
        bits = plan.bits(epoch)
        if step % plan.steps_per_epoch == 0 and epoch > 1 and not plan.alike(epoch, epoch - 1):
            state = plan.enter(state, epoch)
        for batch in plan.batches(state):
            before = totals
            state, totals = yield Request(state, totals, bits, batch)
            # One step is prepared while one runs: further ahead, stopping would wait for all that is queued.
            jax.block_until_ready(before)
            step += 1
            display.step()
            due = plan.checkpoint_every and step % plan.checkpoint_every == 0
            stopped = largest(stop.signal_number or 0)  # a signal to one process ends the same step in all
            if step % plan.steps_per_epoch and (due or stopped):
                _check_finite(state, totals, plan)
                checkpoints.save(step, (state, totals))
            if stopped:
                break
        if step % plan.steps_per_epoch == 0:
            line = _end_epoch(state, totals, plan, epoch, seconds=lambda start=start: time.perf_counter() - start)
            run.log(**line)
            totals = plan.totals
            final = plan.alike(epoch, plan.epochs)
            checkpoints.save(step, (state, totals), plan.score(line) if final else None)
            display.line(
                f"{name}: epoch {epoch} of {plan.epochs}{'' if final else _at(bits, plan.strength(epoch))}, "
                f"loss {line['train_loss']:.4g}, "
                f"validation accuracy {line['validation_accuracy']:.1%}, {line['seconds']:.1f} s"
            )
            ended = _ended(line, plan)
            for warning in _warnings(line, plan):
                display.line(f"{name}: warning: {warning}")
        if stopped or (stopped := largest(stop.signal_number or 0)):
            raise Interrupted(
                f"interrupted: {name} is saved after step {step} of {last}; the same command goes on from there",
                stopped,
            )
    best = checkpoints.best_step
    state, _ = checkpoints.load(best, (state, totals))
    if all(line["step"] != best for line in run.lines(plan.variant)):  # a crash of the machine can lose it
        _log_validated(state, plan, run, epoch=best // plan.steps_per_epoch)
    return state


def _evaluated(state: TrainState, plan: Plan, *, run: RunDirectory, checkpoints: Checkpoints) -> TrainState:
    """The state as it is, validated, logged and saved as if an epoch of no steps had led to it."""
    run.forget_after(plan.variant, -1)
    validation = _log_validated(state, plan, run, epoch=0)
    checkpoints.save(0, (state, plan.totals), plan.score(_named(validation)))
    return state


def _log_validated(state: TrainState, plan: Plan, run: RunDirectory, *, epoch: int) -> dict[str, float]:
    """Validates the state at the end of an epoch and logs what can be said without its steps."""
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


def _end_epoch(state, totals, plan: Plan, epoch: int, *, seconds: Callable[[], float]) -> dict[str, Any]:
    """The epoch's line of metrics."""
    _check_finite(state, totals, plan)
    bits = plan.bits(epoch)
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
        **({} if plan.strength(epoch) is None else {"smoothing_strength": plan.strength(epoch)}),
        "train_loss": float(sums["loss"] / sums["count"]),
        "train_accuracy": float(sums["correct"] / sums["count"]),
        **{f"train_{name}": float(value / sums["count"]) for name, value in sums.items() if name not in _KNOWN_SUMS},
        "collapsed_clips": int(sums["collapsed_clips"]),
        **_named(validation),
        "seconds": round(seconds(), 3),
    }


def _named(validation: dict[str, Any]) -> dict[str, Any]:
    """Scores of the validation images as a line of metrics has them."""
    return {f"validation_{name}": value for name, value in validation.items()}


def _ended(line: dict[str, Any], plan: Plan) -> bool:
    """Whether training ends with the line's epoch before its time; the line says so to a resumed run, too."""
    return plan.alike(line["epoch"], plan.epochs) and plan.reached(line)


def _at(bits: Bits, strength: float | None) -> str:
    weights, activations = ("32" if width is None else str(width) for width in bits)
    smoothing = "" if strength is None else f" and {strength:.0%} of the smoothing"
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
    if line["epoch"] == first_tenth and line["validation_accuracy"] <= guess:
        found = (
            f"a validation accuracy of {line['validation_accuracy']:.1%} after a tenth of the run is that of guessing"
        )
        if line["train_accuracy"] <= guess:
            warnings.append(f"{found}: try a smaller --optimizer.learning-rate, more bits or another --clip-start")
        elif line["step"] >= _STATISTICS_SETTLE:
            warnings.append(
                f"{found}, though that on the training images is {line['train_accuracy']:.1%}: the running batch "
                "statistics do not follow; try a smaller --optimizer.learning-rate or a larger --batch-size"
            )
    return warnings


def _check_finite(state, totals, plan: Plan) -> None:
    if totals["broken"]:
        step = int(state.step)
        epoch = step // plan.steps_per_epoch + 1
        why = plan.explain(state, plan.bits(epoch), *next(iter(plan.batches(state))))
        raise FloatingPointError(
            f"{plan.title}: step {step} (epoch {epoch}) broke down: {why}. Try a smaller "
            "--optimizer.learning-rate; what was saved before stays"
        )
