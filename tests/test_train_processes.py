"""Two real processes that train together: a signal to one stops both, and they go on and end as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from train.checkpoints import damage
from train.cli import main
from train.processes import from_first, join, largest

ROOT = Path(__file__).parents[1]

# 2 epochs of 5 steps. DISTURB="SIGNAL COUNT" makes a process send itself the signal when it issued COUNT steps.
CONFIG = """
import os, signal
from qpde.models import registry
from qpde.models.blocks import BasicBlock
from train.config import Data, Experiment, Model, Variant
from train.progress import Display

registry.ARCHITECTURES["tiny"] = registry.Architecture(BasicBlock, ((4, 4, 1, 1, 1),))
recipes = {"fast": Experiment(
    name="tiny",
    variants=(Variant("plain", {"symmetric": False, "weight_bits": None, "act_bits": None}),),
    data=Data("digits", size=8, crop_padding=1, flip=True),
    model=Model("tiny"),
    epochs=2,
    batch_size=256,
    checkpoint_every=2,
    devices=0,
)}

name, count = os.environ.get("DISTURB", "SIGTERM 0").split()
left, step = [int(count)], Display.step

def disturbed(display):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), getattr(signal, name))
    step(display)

if int(count):
    Display.step = disturbed
"""


def _run_two(folder, disturb=""):
    """Exit statuses and what the two processes printed; `disturb` is for the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "train", "run", "tiny.py", "--name", "two", "--distributed", address]
    running = [
        subprocess.Popen(
            [*command, "--processes", "2", "--process", str(i)],
            cwd=folder,
            env=environment | ({"DISTURB": disturb} if disturb and i == 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], printed


def _lines(folder, name):
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if isinstance(v, float) and k != "seconds"} for line in lines]


def test_two_processes_stop_at_the_same_step_go_on_together_and_end_as_one_with_two_devices(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(CONFIG)
    statuses, printed = _run_two(tmp_path, "SIGTERM 3")
    assert statuses == [143, 143], printed
    assert all("plain is saved after step 3 of 10" in text for text in printed)
    checkpoints = tmp_path / "runs" / "two" / "checkpoints" / "plain"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "3"]
    assert [damage(path) for path in checkpoints.iterdir()] == [None, None]
    written = {path for path in (checkpoints / "3").rglob("*") if path.is_file()}
    assert any("process_1" in str(path) for path in written) or len(written) > 5

    statuses, printed = _run_two(tmp_path)
    assert statuses == [0, 0], printed
    assert "going on after step 3 of 10" in printed[0]
    assert "epoch" not in printed[1]  # the first one speaks

    monkeypatch.chdir(tmp_path)
    assert main(["run", "tiny.py", "--name", "one", "--devices", "2"]) == 0
    for two, one in zip(_lines(tmp_path, "two"), _lines(tmp_path, "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=2e-3)  # a prediction may turn over
    two, one = (json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("two", "one"))
    assert two["variants"]["plain"]["accuracy"] == pytest.approx(one["variants"]["plain"]["accuracy"], abs=4e-3)


def test_alone_a_process_agrees_with_itself():
    assert from_first(lambda: 3) == 3
    assert largest(2) == 2
    with pytest.raises(FileExistsError):
        from_first(lambda: (_ for _ in ()).throw(FileExistsError()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto", 2, None), "found by themselves with --distributed auto"),
        (("host:1", 2, 2), r"needs --processes \(=2\) and --process \(=2\), from 0 to one less"),
        (("host:1",), "needs --processes"),
        (("auto",), "do not find each other"),
    ],
)
def test_processes_that_cannot_find_each_other_are_told_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        join(*arguments)
