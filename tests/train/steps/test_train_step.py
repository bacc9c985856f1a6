"""One step of training, and evaluation."""

import numpy as np
import pytest
from tiny_training import normalize, problem, train

from qpde.datasets import Split
from train.data.order import epoch_order
from train.data.resident import stack_batches
from train.steps.train_step import empty_totals, make_evaluate


def test_training_lowers_the_loss_and_compiles_once():
    model, state, step, data, traced = problem()
    state, losses, totals = train(state, step, data, 10)
    assert losses[-1] < 0.2 * losses[0]
    assert int(state.step) == 40
    assert float(totals["count"]) == 32
    assert not totals["broken"]
    assert float(totals["collapsed_clips"]) == 0
    assert len(traced) == 1
    scores = make_evaluate(model, normalize)(state.variables, [(data[0][None], data[1][None])])
    assert scores["accuracy"] > 0.9


def test_the_step_gives_its_old_state_back_to_the_device():
    _, state, step, data, _ = problem()
    kernel, totals = state.params["Dense_0"]["kernel"], empty_totals()
    step(state, totals, None, *data, epoch_order(state, count=32, steps_per_epoch=4))
    assert kernel.is_deleted()
    assert not data[0].is_deleted()


def test_batch_statistics_are_carried_by_the_state():
    _, state, step, data, _ = problem()
    before = np.asarray(state.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    after, *_ = step(state, empty_totals(), None, *data, epoch_order(state, count=32, steps_per_epoch=4))
    assert np.any(before != np.asarray(after.model_state["batch_stats"]["BatchNorm_0"]["mean"]))


@pytest.mark.parametrize("batch_size", [4, 5, 7])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    model, state, _, (images, labels), _ = problem()
    evaluate = make_evaluate(model, normalize)
    split = Split(np.asarray(images), np.asarray(labels))
    scores = evaluate(state.variables, [stack_batches(split, batch_size)])
    whole = evaluate(state.variables, [(images[None], labels[None])])
    assert scores["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-6)
    assert scores["loss"] == pytest.approx(whole["loss"], rel=1e-5)
