"""A run repeated from its saved configuration is the same run, and one that is not is found out."""

import json
from pathlib import Path

import jax
import pytest

from train.commands.cli import main
from train.config.graphs import GraphExperiment, GraphModel, GraphVariant
from train.config.serialize import to_json

pytestmark = pytest.mark.usefixtures("compiled_once")

EXPERIMENT = GraphExperiment(
    "tiny", variants=(GraphVariant("symmetric"),), model=GraphModel(layers=1, width=4), bits=(), epochs=2, seeds=2
)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a finished run, in a fresh folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    lines = [
        "from train.config.serialize import from_json",
        f"recipes = {{'fast': from_json({to_json(EXPERIMENT)!r})}}",
    ]
    Path("tiny.py").write_text("\n".join(lines) + "\n")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power
        assert main(["run", "tiny.py"]) == 0
        yield Path("runs", "tiny")


def test_a_replay_is_identical_unless_something_was_changed(finished, capsys):
    assert main(["reproduce", str(finished)]) == 0
    assert "identical to runs/tiny" in capsys.readouterr().out

    lines = (finished / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[0])
    changed["train_loss"][1] += 1e-6
    (finished / "metrics.jsonl").write_text(json.dumps(changed) + "\n")
    assert main(["reproduce", str(finished)]) == 2
    assert "finished run: choose another --into, or --overwrite" in capsys.readouterr().err
    assert main(["reproduce", str(finished), "--overwrite"]) == 1
    assert "differs: metrics.jsonl[0].train_loss[1]" in capsys.readouterr().out


def test_networks_are_compared_bit_by_bit(finished, capsys):
    assert main(["run", "tiny.py", "--seed", "5", "--runs-dir", "elsewhere"]) == 0
    for name in ("metrics.jsonl", "summary.json"):
        Path("elsewhere", "tiny", name).write_text((finished / name).read_text())
    Path("elsewhere", "tiny", "config.json").write_text((finished / "config.json").read_text())
    assert main(["reproduce", "elsewhere/tiny"]) == 1
    assert "stem_kernel']: by up to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "holds no finished run"),
        (["runs/tiny", "--into", "runs"], "where the run itself lies"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(finished, capsys, arguments, message):
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_network_is_found_before_the_repetition_begins(finished, capsys):
    (weights,) = finished.rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["reproduce", str(finished)]) == 2
    assert "was cut short or altered" in capsys.readouterr().err
    assert not Path("reproduced").exists()
