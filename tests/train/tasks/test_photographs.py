"""The experiments on ImageNet, end to end, on a few made-up photographs and with networks of two or three blocks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_sets import photographs, prepare

from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import main
from train.commands.reproduce import differences
from train.host.console import Display

ROOT = Path(__file__).parents[3]

SMALL = ["--only", "symmetric", "--epochs", "2", "--batch-size", "8", "--data.size", "16", "--checkpoint-every", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("imagenet2012", folder, train=photographs(33, seed=0), validation=photographs(12, seed=1))
    return folder


@pytest.mark.usefixtures("compiled_once")
def test_a_run_on_streamed_photographs_that_is_stopped_within_an_epoch_ends_bit_for_bit_the_same(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(
        registry.ARCHITECTURES, "resnet34", registry.Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),))
    )
    monkeypatch.chdir(tmp_path)
    command = ["run", str(ROOT / "configs/imagenet_resnet34.py"), "--data-dir", str(data), *SMALL]
    assert main([*command, "--runs-dir", "whole"]) == 0
    assert "agreement with the twin" in capsys.readouterr().out
    result = json.loads((tmp_path / "whole/imagenet_resnet34/summary.json").read_text())["variants"]["symmetric"]
    assert result["samples"] == 12
    assert len(result["layer_error"]) == 2

    left, step = [6], Display.step  # four steps an epoch: in the middle of the second

    def stop(display):
        step(display)
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Display, "step", stop)
    assert main([*command, "--runs-dir", "cut"]) == 143
    assert "saved after step 6 of 8" in capsys.readouterr().err
    assert main([*command, "--runs-dir", "cut"]) == 0
    assert "going on after step 6 of 8" in capsys.readouterr().out
    assert list(differences(*(tmp_path / name / "imagenet_resnet34" for name in ("whole", "cut")))) == []


PROGRAM = """
import sys
from qpde.models import registry
from qpde.models.images.blocks import InvertedBlock
from train.commands.cli import main
blocks = ((8, 8, 1, 1, 1), (8, 16, 2, 2, 2))
registry.ARCHITECTURES["mobilenetv2"] = registry.Architecture("tiny", InvertedBlock, blocks, neck_width=32)
status = main(sys.argv[1:])
print("tensorflow" in sys.modules, "tensorflow_datasets" in sys.modules, "grain" in sys.modules)
sys.exit(status)
"""


def test_a_prepared_set_is_trained_on_without_tensorflow(data, tmp_path):
    arguments = [
        str(ROOT / "configs/imagenet_mobilenetv2.py"),
        "--recipe",
        "published",
        "--data-dir",
        str(data),
        *SMALL,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "run", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "False True True"
    summary = json.loads((tmp_path / "runs/imagenet_mobilenetv2_published/summary.json").read_text())
    assert summary["variants"]["symmetric"]["samples"] == 12
