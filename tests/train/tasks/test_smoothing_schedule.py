"""Training with smoothing that is learned or scheduled: one step on a toy, and whole runs of a tiny network."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpde
import train.tasks.images as application
from qpde import stencils
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import main
from train.config.images import Optimizer
from train.steps.optimizer import create_optimizer
from train.steps.state import create_state
from train.steps.train_step import make_train_step
from train.trained.finished import read_finished

pytestmark = pytest.mark.usefixtures("compiled_once")

BOUND = stencils.max_stable_step(eps=0.1)

CONFIG = """
from qpde.models import Smoothing
from train.config import Data, Experiment, Model, Optimizer, Rule, Variant

recipes = {"fast": Experiment(
    name="tiny",
    variants=(Variant("symmetric"),),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny", smoothing=Smoothing(gamma2=0.0125, learned=True)),
    optimizer=Optimizer(averaging=0.5, rules=(Rule("clip", weight_decay=0.0),)),
    epochs=3,
    batch_size=256,
)}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A file of recipes for a network of two blocks, in a fresh folder that is also the working directory."""
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),)))
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(CONFIG)
    return "tiny.py"


def _lines(name):
    lines = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def _result(name):
    result = json.loads(Path("runs", name, "summary.json").read_text())["variants"]["symmetric"]
    return {key: value for key, value in result.items() if key != "training_seconds"}


def _course(learning_rate, start, steps=12):
    """gamma2 after each step towards a map that was smoothed with 0.01."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    target = stencils.tv_step(x, gamma2=0.01, eps=0.1)

    def loss(params, model_state, x, targets, bits):
        value = jnp.sum((stencils.tv_step(x, gamma2=params["gamma2"], eps=0.1) - targets) ** 2)
        return value, ({"loss": value}, jnp.zeros((2, 3)), model_state)

    params = {"gamma2": jnp.float32(start)}
    config = Optimizer(learning_rate=learning_rate, schedule="constant", momentum=0.0, weight_decay=0.0)
    optimizer = create_optimizer(config, params, steps=steps)
    step = jax.jit(make_train_step(loss, optimizer, lambda key, x, y: (x, target, y), ranges={"gamma2": (0.0, BOUND)}))
    state, found = create_state({"params": params}, optimizer, jax.random.key(0)), []
    for _ in range(steps):
        state, _ = step(state, (x, jnp.zeros(2, jnp.int32)), jax.random.key(1), None)
        found.append(float(state.params["gamma2"]))
    return np.array(found)


def test_however_long_the_step_gamma2_stays_stable_and_from_both_ends_it_comes_back():
    wild = _course(1e6, start=BOUND)
    assert wild.min() == 0
    assert wild.max() == np.float32(BOUND)  # so it reached either end and went on to the other
    for start in (0.0, BOUND):
        np.testing.assert_allclose(_course(5e-4, start, steps=20)[-1], 0.01, rtol=0.01)


def test_a_run_learns_its_gamma2_as_smoothing_rises_or_falls(config, monkeypatch, capsys):
    traced, make = [], application.make_train_step

    def counted(*arguments, **options):
        step = make(*arguments, **options)
        return lambda *inner: traced.append(1) or step(*inner)

    monkeypatch.setattr(application, "make_train_step", counted)
    schedule = ["--annealing.smoothing.epochs", "2", "--annealing.smoothing.schedule"]
    command = ["run", config, *schedule, "rise", "--name"]
    assert main([*command, "whole"]) == 0
    assert "gamma2 of the blocks that smooth, mean" in capsys.readouterr().out
    assert len(traced) == 1
    assert [line["smoothing_scale"] for line in _lines("whole")] == [0, 0.5, 1]
    result = _result("whole")
    assert result["best_epoch"] == 3
    assert len(result["gamma2"]) == 2
    assert all(0 <= value <= np.float32(BOUND) and abs(value - 0.0125) > 1e-4 for value in result["gamma2"])
    assert result["mean_gamma2"] == pytest.approx(np.mean(result["gamma2"]))
    assert qpde.load("runs/whole/symmetric").variables["smoothing"]["scale"] == 1

    # Whoever takes up a network finds it as it ended, here without smoothing.
    assert main(["run", config, *schedule, "fall", "--name", "fall"]) == 0
    assert [line["smoothing_scale"] for line in _lines("fall")] == [1, 0.5, 0]
    (found,) = read_finished(Path("runs/fall"), None).values()
    assert float(found.variables["smoothing"]["scale"]) == 0
    assert _result("fall")["gamma2"] == [0, 0]
    assert main([*command, "short", "--epochs", "2"]) == 2
    assert "leaves none of 2 epochs at the final scale" in capsys.readouterr().err
