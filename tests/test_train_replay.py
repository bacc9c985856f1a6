"""A run repeated from its saved configuration is the same run, and one that is not is found out."""

import json
from pathlib import Path

import jax
import pytest

from train.cli import main
from train.nodes.config import GraphExperiment, GraphModel, GraphVariant
from train.stored import to_json

pytestmark = pytest.mark.usefixtures("compiled_once")

EXPERIMENT = GraphExperiment(
    "tiny", variants=(GraphVariant("symmetric"),), model=GraphModel(layers=1, width=4), bits=(), epochs=2, seeds=2
)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a finished run, in a fresh folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    lines = ["from train.stored import from_json", f"recipes = {{'fast': from_json({to_json(EXPERIMENT)!r})}}"]
    Path("tiny.py").write_text("\n".join(lines) + "\n")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power
        assert main(["run", "tiny.py"]) == 0
        yield Path("runs", "tiny")


def test_a_replay_is_identical_unless_something_was_changed(finished, capsys):
    assert main(["replay", str(finished)]) == 0
    assert "identical to runs/tiny" in capsys.readouterr().out

    lines = (finished / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[0])
    changed["train_loss"][1] += 1e-6
    (finished / "metrics.jsonl").write_text(json.dumps(changed) + "\n")
    assert main(["replay", str(finished)]) == 2
    assert "finished run: choose another --replays-dir, or --overwrite" in capsys.readouterr().err
    assert main(["replay", str(finished), "--overwrite"]) == 1
    assert "differs: metrics.jsonl[0].train_loss[1]" in capsys.readouterr().out


def test_parameters_are_compared_bit_by_bit(finished, capsys):
    assert main(["run", "tiny.py", "--seed", "1", "--runs-dir", "elsewhere"]) == 0
    for name in ("metrics.jsonl", "summary.json"):
        Path("elsewhere", "tiny", name).write_text((finished / name).read_text())
    Path("elsewhere", "tiny", "config.json").write_text((finished / "config.json").read_text())
    assert main(["replay", "elsewhere/tiny"]) == 1
    assert "opening_kernel']: by up to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "holds no finished run"),
        (["runs/tiny", "--replays-dir", "runs"], "where the run itself lies"),
    ],
)
def test_what_cannot_be_replayed_is_refused(finished, capsys, arguments, message):
    assert main(["replay", *arguments]) == 2
    assert message in capsys.readouterr().err
