"""Runs that are killed, as processes, and go on: they must end as the run that nothing disturbed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train.config.images import Experiment, Variant
from train.runs.checkpoints import damage, seal
from train.runs.directory import open_run

ROOT = Path(__file__).parents[3]

# One variant of two blocks, 3 epochs of 5 steps. DISTURB="SIGNAL PLACE COUNT" makes the process send itself the signal
# when it reaches that place for the COUNT-th time: after it issued a step, or inside the thread that writes a state.
CONFIG = """
import os, signal
from qpde.models import Architecture
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
import train.runs.checkpoints
from train.config import Data, Experiment, Model, Variant
from train.host.console import Display

registry.ARCHITECTURES["tiny"] = registry.Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),))
recipes = {"fast": Experiment(
    name="tiny",
    variants=(Variant("symmetric"),),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny", norm="spectral"),
    epochs=3,
    batch_size=256,
    checkpoint_every=2,
)}

def disturbed(function, name, left):
    def call(*arguments):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(getattr(signal, name))
        return function(*arguments)
    return call

name, place, count = os.environ.get("DISTURB", "SIGTERM nowhere 0").split()
if place == "step":
    Display.step = disturbed(Display.step, name, [int(count)])
if place == "save":
    train.runs.checkpoints.seal = disturbed(train.runs.checkpoints.seal, name, [int(count)])
"""


@pytest.fixture(autouse=True)
def interruptible():
    """A background job of a shell ignores SIGINT, and its children with it: the tests are not to depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    (path / "tiny.py").write_text(CONFIG)
    return path


def _run(folder, name, disturb="", *options):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_LOG_COMPILES": "1",
    }
    if disturb:
        environment["DISTURB"] = disturb
    command = [sys.executable, "-m", "train", "run", "tiny.py", "--name", name, *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert printed.count("Compiling jit(epoch_step)") == 1, "the step of a resumed run is another program"
    return done.returncode, printed


def _states(folder, name):
    """Every state that the run has kept, by step, as plain arrays."""
    with ocp.CheckpointManager(folder / "runs" / name / "checkpoints" / "symmetric") as manager:
        return {step: manager.restore(step, args=ocp.args.StandardRestore()) for step in manager.all_steps()}


def _metrics(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def _summary(folder, name):
    variants = json.loads((folder / "runs" / name / "summary.json").read_text())["variants"]
    return {k: {f: x for f, x in v.items() if f != "training_seconds"} for k, v in variants.items()}


def _flip_a_bit(checkpoint):
    """In the middle of the largest file."""
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_killed_at_any_point_ends_bit_for_bit_as_the_one_that_was_never_stopped(folder):
    status, printed = _run(folder, "whole")
    assert status == 0, printed

    checkpoints = folder / "runs" / "cut" / "checkpoints" / "symmetric"
    steps = lambda: sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())  # noqa: E731

    # SIGTERM in the first epoch: the step in hand is finished and saved.
    status, printed = _run(folder, "cut", "SIGTERM step 3")
    assert status == 143, printed
    assert "symmetric is saved after step 3 of 15; the same command continues from there" in printed
    assert steps()[-1] == 3

    # A bit of that state turns over: the one before it is used. Then Ctrl-C in the second epoch.
    _flip_a_bit(checkpoints / "3")
    status, printed = _run(folder, "cut", "SIGINT step 5")
    assert "a damaged checkpoint was set aside as" in printed
    assert "going on after step 2 of 15" in printed
    assert status == 130, printed
    assert steps()[-1] == 7
    assert (checkpoints / "3.damaged").is_dir()

    # SIGKILL between two saves, then inside one: the step that was saved before counts.
    status, printed = _run(folder, "cut", "SIGKILL step 4")
    assert status == -signal.SIGKILL, printed
    assert "going on after step 7 of 15" in printed
    assert steps()[-1] in (8, 10)  # the last save may not have been complete
    status, printed = _run(folder, "cut", "SIGKILL save 2")
    assert status == -signal.SIGKILL, printed
    unfinished = [path.name for path in checkpoints.iterdir() if "tmp" in path.name]
    assert len(unfinished) == 1

    status, printed = _run(folder, "cut")
    assert status == 0, printed
    assert not [path.name for path in checkpoints.iterdir() if "tmp" in path.name]
    assert _metrics(folder, "cut") == _metrics(folder, "whole")
    assert _summary(folder, "cut") == _summary(folder, "whole")
    whole, cut = _states(folder, "whole"), _states(folder, "cut")
    assert cut.keys() == whole.keys()
    assert max(cut) == 15
    jax.tree.map(np.testing.assert_array_equal, cut, whole)


def test_a_run_goes_on_under_another_configuration_only_when_told_and_records_it(tmp_path):
    before = Experiment(name="run", variants=(Variant("a"),))
    open_run(tmp_path, before).__exit__()
    config = (tmp_path / "run" / "config.json").read_text()
    longer = Experiment(name="run", variants=(Variant("a"),), epochs=20, seed=1)
    with pytest.raises(FileExistsError, match=r"epochs: 10 there, 20 now; seed: 0 there, 1 now.*--resume-changed"):
        open_run(tmp_path, longer)
    assert (tmp_path / "run" / "config.json").read_text() == config
    other_steps = Experiment(name="run", variants=(Variant("a"),), batch_size=64)
    with pytest.raises(FileExistsError, match="cannot be resumed with other steps"):
        open_run(tmp_path, other_steps, resume_changed=True)

    with open_run(tmp_path, longer, resume_changed=True) as run:
        assert run.changes == ["epochs: 10 there, 20 now", "seed: 0 there, 1 now"]
    (line,) = (tmp_path / "run" / "config_history.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "metrics_lines": 0,
        "changes": {"epochs": {"before": 10, "now": 20}, "seed": {"before": 0, "now": 1}},
    }
    with open_run(tmp_path, longer) as run:
        assert run.changes == []


def test_damage_names_the_file(tmp_path):
    (tmp_path / "item").mkdir()
    (tmp_path / "item" / "a").write_bytes(b"1234")
    assert "SHA256SUMS" in damage(tmp_path)
    seal(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "item" / "a").write_bytes(b"123")
    assert damage(tmp_path) == "item/a is not what was written"
    (tmp_path / "item" / "a").unlink()
    assert damage(tmp_path) == "item/a is missing"
