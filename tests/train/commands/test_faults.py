"""A run as a process that meets with a full disk and an impatient person, and is taken up."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

# 3 epochs of 5 steps. FAULT="NAME STEP": what happens when that step has been issued.
CONFIG = """
import os, resource, signal
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
from train.config import Data, Experiment, Model, Variant
from train.host.console import Display

registry.ARCHITECTURES["tiny"] = registry.Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),))
recipes = {"fast": Experiment(
    name="tiny",
    variants=(Variant("plain", {"symmetric": False}),),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny"),
    epochs=3,
    batch_size=256,
    checkpoint_every=1,
)}

name, number = os.environ["FAULT"].split()
left, step = [int(number)], Display.step

def faulty(*arguments):
    left[0] -= 1
    if left[0] == 0 and name == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    if left[0] == 0 and name == "impatient":
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    return step(*arguments)

Display.step = faulty
"""


def _run(folder, fault):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "FAULT": fault}
    # A background job of a shell ignores SIGINT, and its children with it: the test is not to depend on that.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = ['train', 'run', 'tiny.py']; runpy.run_module('train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_full_disk_and_several_ctrl_c_are_short_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    status, _, errors = _run(tmp_path, "full 4")
    place = tmp_path / "runs" / "tiny" / "checkpoints" / "plain"
    assert errors.splitlines()[-1] == (
        f"error: a state could not be written to {place}: File too large. Earlier checkpoints are kept. Once the "
        "cause is removed, the same command continues from there"
    )
    assert "Traceback" not in errors
    assert status == 1

    status, printed, errors = _run(tmp_path, "impatient 3")
    assert "plain: going on after step" in printed
    assert (status, errors) == (-signal.SIGINT, "")

    status, printed, errors = _run(tmp_path, "none 0")
    assert "plain: going on after step" in printed
    assert (status, errors) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
