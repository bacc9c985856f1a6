"""The loop over epochs around steps that only count: what it saves, says, refuses and stops at."""

import dataclasses
import io
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from qpde.bits import Bits
from train.config.images import Experiment, Variant
from train.host.console import Display
from train.host.interrupt import Interrupted
from train.loop import fit
from train.runs.checkpoints import Checkpoints
from train.runs.directory import open_run
from train.steps.guards import SMALLEST_CLIP
from train.steps.state import TrainState
from train.steps.train_step import empty_totals


@pytest.fixture(autouse=True)
def interruptible():
    """A background job of a shell ignores SIGINT, and its children with it: the tests are not to depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _state(step=0):
    return TrainState(jnp.int32(step), {"w": jnp.float32(step)}, {}, {}, None, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class CountingPlan:
    """A `train.loop.Plan` whose methods are given one by one."""

    variant: str
    title: str
    epochs: int
    steps_per_epoch: int
    checkpoint_every: int
    totals: Any
    chance: float
    bits: Callable
    smoothing_scale: Callable
    enter: Callable
    batches: Callable
    step: Callable
    evaluate: Callable
    score: Callable
    reached: Callable
    explain: Callable


def _plan(**changes):
    """Ten epochs of three steps; half of ten images are right in each."""

    def step(state, totals, bits):
        sums = {"loss": jnp.float32(20), "correct": jnp.float32(5), "count": jnp.float32(10)}
        totals = totals | {name: totals[name] + value for name, value in sums.items()}
        return _state(int(state.step) + 1), totals

    plan = CountingPlan(
        variant="a",
        title="a",
        epochs=10,
        steps_per_epoch=3,
        checkpoint_every=0,
        bits=lambda epoch: Bits(4, 4),
        smoothing_scale=lambda epoch: None,
        enter=lambda state, epoch: pytest.fail("the widths never change"),
        step=step,
        totals=empty_totals(),
        batches=lambda state: [()] * (3 - int(state.step) % 3),
        evaluate=lambda variables, bits: {"accuracy": 0.5, "loss": 1.0},
        score=lambda line: {"accuracy": line["validation_accuracy"], "loss": line["validation_loss"]},
        reached=lambda line: False,
        explain=lambda state, bits: f"the step from {int(state.step)}",
        chance=0.1,
    )
    return dataclasses.replace(plan, **changes)


def _fit(tmp_path, plan):
    """The state that `fit` returns or the exception that it raises, and all it said."""
    said = io.StringIO()
    with (
        open_run(tmp_path, Experiment(name="run", variants=(Variant("a"),))) as run,
        Checkpoints(run.checkpoints("a")) as checkpoints,
        Display(Console(file=said, width=1000), "a", steps=30, done=0) as display,
    ):
        try:
            result = fit(_state(), plan, run=run, checkpoints=checkpoints, display=display)
        except (FloatingPointError, Interrupted) as error:
            result = error
        return result, said.getvalue(), checkpoints.last_step, run.lines("a")


def test_the_best_state_is_returned_and_a_finished_training_is_not_repeated(tmp_path):
    plan = _plan(
        evaluate=lambda variables, bits: {"accuracy": 0.7 if float(variables["params"]["w"]) == 12 else 0.5, "loss": 1}
    )
    for _ in range(2):
        state, said, last, lines = _fit(tmp_path, plan)
        assert int(state.step) == 12
        assert last == 30
        assert [line["epoch"] for line in lines] == list(range(1, 11))
        assert lines[0]["train_loss"] == 2.0
        assert "warning" not in said
    assert "epoch 10" not in said  # the second time there was nothing left to train


def test_a_broken_step_is_explained_and_its_state_never_saved(tmp_path):
    plan = _plan(checkpoint_every=2)

    def step(state, totals, bits):
        if int(state.step) == 4:
            return state, totals | {"broken": jnp.bool_(True)}
        return plan.step(state, totals, bits)

    error, _, last, lines = _fit(tmp_path, dataclasses.replace(plan, step=step))
    assert isinstance(error, FloatingPointError)
    assert "a: step 4 (epoch 2) broke down: the step from 4" in str(error)
    assert last == 4  # saved when it was still good
    assert len(lines) == 1


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path):
    error, _, last, _ = _fit(tmp_path, _plan(evaluate=lambda variables, bits: {"accuracy": 0.1, "loss": float("nan")}))
    assert isinstance(error, FloatingPointError)
    assert "the validation loss after epoch 1 is not finite" in str(error)
    assert last == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_in_hand_and_its_state_is_saved(tmp_path, number, status):
    plan = _plan()

    def step(state, totals, bits):
        if int(state.step) == 4:
            signal.raise_signal(number)
        return plan.step(state, totals, bits)

    error, _, last, _ = _fit(tmp_path, dataclasses.replace(plan, step=step))
    assert isinstance(error, Interrupted)
    assert error.exit_status == status
    assert "saved after step 5 of 30" in str(error)
    assert last == 5
    state, said, last, lines = _fit(tmp_path, plan)
    assert "going on after step 5 of 30" in said
    assert (int(state.step), last, len(lines)) == (30, 30, 10)  # of equal scores the last
    assert [line["train_loss"] for line in lines] == [2.0] * 10  # the sums of the cut epoch were saved too


def test_the_line_of_the_best_epoch_is_validated_again_where_it_was_lost(tmp_path):
    plan = _plan(epochs=2)
    *_, whole = _fit(tmp_path, plan)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    for _ in range(2):
        state, _, last, lines = _fit(tmp_path, plan)
        assert (int(state.step), last) == (6, 6)
        assert [line["step"] for line in lines] == [3, 6]
        for name in ("epoch", "weight_bits", "validation_accuracy", "validation_loss"):
            assert lines[-1][name] == whole[-1][name]


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    _fit(tmp_path, _plan(epochs=1))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"variant"\n' + metrics.read_text())
    with pytest.raises(OSError, match=r"metrics.jsonl, line 2, is damaged \(.*\): delete that line"):
        _fit(tmp_path, _plan())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_without_steps_when_its_state_is_saved(tmp_path, number, status):
    def evaluate(variables, bits):
        signal.raise_signal(number)
        return {"accuracy": 0.5, "loss": 1.0}

    error, _, _, lines = _fit(tmp_path, _plan(epochs=0, evaluate=evaluate))
    assert isinstance(error, Interrupted)
    assert error.exit_status == status
    assert "a is saved; the same command continues" in str(error)
    state, *_, again = _fit(tmp_path, _plan(epochs=0))
    assert (int(state.step), len(lines), len(again)) == (0, 1, 1)


@pytest.mark.parametrize(("accuracy", "right", "warns"), [(0.10, 1, True), (0.10, 9, False), (0.20, 1, False)])
def test_accuracy_at_chance_after_a_tenth_of_the_run_is_a_warning(tmp_path, accuracy, right, warns):
    def step(state, totals, bits):
        return _state(int(state.step) + 1), totals | {"correct": jnp.float32(right), "count": jnp.float32(10)}

    plan = _plan(epochs=11, step=step, evaluate=lambda variables, bits: {"accuracy": accuracy, "loss": 1.0})
    _, said, *_ = _fit(tmp_path, plan)
    assert said.count("warning") == warns
    if warns:
        assert "is that of guessing: try a smaller" in said
        assert said.index("epoch 2 of 11") < said.index("warning") < said.index("epoch 3 of 11")


def test_collapsed_clips_are_logged_and_a_warning(tmp_path):
    plan = _plan(epochs=1)

    def step(state, totals, bits):
        state, totals = plan.step(state, totals, bits)
        return state, totals | {"collapsed_clips": totals["collapsed_clips"] + 2}

    _, said, _, (line,) = _fit(tmp_path, dataclasses.replace(plan, step=step))
    assert line["collapsed_clips"] == 6
    assert f"clips that fell below {SMALLEST_CLIP} and were raised to it: 6" in said


def test_only_epochs_at_the_final_widths_can_be_the_best_and_a_change_is_entered_once(tmp_path):
    entered, seen = [], []
    count = _plan().step

    def enter(state, epoch):
        entered.append((int(state.step), epoch))
        return state

    def step(state, totals, bits):
        seen.append(bits.weights)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGTERM)
        return count(state, totals, bits)

    # The wider the better, so that a choice among all epochs would take the first.
    plan = _plan(
        bits=lambda epoch: Bits(max(4, 7 - epoch), 4),
        enter=enter,
        step=step,
        evaluate=lambda variables, bits: {"accuracy": bits.weights / 10, "loss": 1.0},
    )
    _fit(tmp_path, plan)
    assert entered == [(3, 2)]
    state, said, _, lines = _fit(tmp_path, plan)
    assert entered == [(3, 2), (6, 3)]  # not again in the middle of the second epoch
    assert seen == [6] * 3 + [5] * 3 + [4] * 24
    assert int(state.step) == 30
    assert [line["weight_bits"] for line in lines] == [6, 5] + [4] * 8
    assert {line["act_bits"] for line in lines} == {4}
    assert "epoch 2 of 10 at 5 and 4 bits" in said


def test_training_ends_early_where_its_target_is_reached_at_the_final_widths_and_a_resumed_one_knows(tmp_path):
    plan = _plan(
        bits=lambda epoch: Bits(4, 8 if epoch < 3 else 4),
        enter=lambda state, epoch: state,
        reached=lambda line: line["epoch"] != 3,  # already in the first epoch, at other widths
        score=lambda line: {"accuracy": 0.0, "loss": line["epoch"]},
    )
    for _ in range(2):
        state, _, last, lines = _fit(tmp_path, plan)
        assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
        assert (int(state.step), last) == (9, 12)  # the lower score of the two epochs at the final widths


def test_only_epochs_at_the_full_smoothing_can_be_the_best_and_a_change_is_entered(tmp_path):
    entered = []
    plan = _plan(
        epochs=4,
        smoothing_scale=lambda epoch: min(1.0, (epoch - 1) / 2),
        enter=lambda state, epoch: entered.append(epoch) or state,
        evaluate=lambda variables, bits: {"accuracy": 1 / (1 + float(variables["params"]["w"])), "loss": 1.0},
    )
    state, said, _, lines = _fit(tmp_path, plan)
    assert entered == [2, 3]
    assert int(state.step) == 9  # the first of the two
    assert [line["smoothing_scale"] for line in lines] == [0, 0.5, 1, 1]
    assert "epoch 2 of 4 at 4 and 4 bits and 50% of the smoothing" in said
    assert "epoch 3 of 4, " in said
