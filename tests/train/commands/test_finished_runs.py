"""Finished runs certified, measured at other bits and given budgets of bits, on a network small enough for a test."""

import csv
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import summary

import qpde
from train.commands.cli import main
from train.config.images import Experiment, Model, Variant
from train.config.serialize import to_json
from train.host.console import Display
from train.trained.finished import Finished, read_finished

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_predictions_of_a_finished_run_are_certified(config, tmp_path, capsys):
    tight = ["--model.norm", "spectral", "--model.residual", "precise", "--only", "symmetric", "--epochs", "1"]
    assert main(["run", config, *tight]) == 0
    capsys.readouterr()
    by_constants = ["certify", "runs/tiny", "--newton-steps", "2", "--images", "999"]
    assert main([*by_constants, "--bits", "12", "4"]) == 0
    many, few = [line.split() for line in capsys.readouterr().out.splitlines() if "symmetric" in line]
    shares = {row[0]: [float(cell.rstrip("%")) for cell in row[2:]] for row in (many, few)}
    for _, agreement, certified, a_priori, tightness in shares.values():
        assert 0 <= a_priori <= certified <= agreement <= 100
        assert tightness >= 1
    assert shares["12"][2] > shares["4"][2]
    # The run's own width is 4; only its spectral norms have converged since.
    assert shares["4"][0] == pytest.approx(100 * summary(tmp_path)["symmetric"]["accuracy"], abs=1)
    assert main(["certify", "runs/tiny", "--bits", "4", "--images", "999"]) == 0
    out = capsys.readouterr().out
    assert "the twin itself" in out
    (row,) = [line.split() for line in out.splitlines() if "symmetric" in line]
    assert row[4] == row[3] == f"{shares['4'][1]}%"  # all that agree are proven

    refused = {
        "no folder of a run": ["runs/nowhere"],
        "must round": ["runs/tiny", "--bits", "16"],
        "images (=0)": ["runs/tiny", "--images", "0"],
        "newton_steps (=-1)": ["runs/tiny", "--newton-steps", "-1"],
    }
    for message, arguments in refused.items():
        assert main(["certify", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_finished_run_is_measured_at_other_widths_and_its_blocks_get_widths_within_a_budget(config, tmp_path, capsys):
    assert main(["run", config, "--only", "symmetric", "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main(["elastic", "runs/tiny", "--bits", "2", "W4A4", "32"]) == 0
    assert "one set of weights at several bits" in capsys.readouterr().out
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "elastic.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "elastic.csv") as file:
        rows = {row["bits"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["W2A2", "W4A4", "W32A32"]
    assert float(rows["W4A4"]["accuracy"]) == pytest.approx(summary(tmp_path)["symmetric"]["accuracy"], abs=1 / 320)
    assert float(rows["W4A4"]["agreement"]) == pytest.approx(summary(tmp_path)["symmetric"]["agreement"], abs=1 / 320)
    assert float(rows["W32A32"]["agreement_full"]) == 1 > float(rows["W2A2"]["agreement_full"])
    assert float(rows["W32A32"]["kl_full"]) == 0

    assert main(["budget", "runs/tiny", "--bits", "2", "4", "8", "--at", "3", "--images", "256"]) == 0
    printed = capsys.readouterr().out.splitlines()
    uniform, mixed = [line.split() for line in printed if "W3A3" in line or "mixed" in line]
    assert float(mixed[1]) <= float(uniform[2])
    assert len(mixed[5:]) == 2  # one pair of widths for each block

    for message, *arguments in (
        ("bits '1' must lie in 2 to 32", "elastic", "runs/tiny", "--bits", "1"),
        ("is no folder of a run", "elastic", "runs/nowhere"),
        ("--bits (=33) must lie in 2 to 32", "budget", "runs/tiny", "--bits", "33"),
        ("less than the cheapest of --bits", "budget", "runs/tiny", "--bits", "4", "--at", "3"),
        ("images (=0)", "budget", "runs/tiny", "--images", "0"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_widths_drawn_at_every_step_train_one_network_with_clips_for_each_and_survive_an_interruption(
    config, tmp_path, monkeypatch, capsys
):
    draw = ["--model.clip-bits", "3", "4", "8", "--clip-start", "mse"]
    for part in ("weights", "activations"):
        draw += [f"--annealing.{part}.schedule", "random", f"--annealing.{part}.bits", "3", "8"]
    only = ["run", config, "--only", "symmetric", "--epochs", "2", *draw]
    assert main([*only, "--name", "whole"]) == 0
    step = Display.step
    steps = []

    def interrupt(display):
        steps.append(1)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGTERM)
        step(display)

    monkeypatch.setattr(Display, "step", interrupt)
    assert main([*only, "--name", "cut"]) == 143
    assert main([*only, "--name", "cut"]) == 0
    assert summary(tmp_path, "cut") == summary(tmp_path, "whole")
    lines = [json.loads(line) for line in (tmp_path / "runs" / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["weight_bits"], line["act_bits"]) for line in lines] == [(4, 4)] * 2

    trained = read_finished(tmp_path / "runs" / "cut", None)["symmetric"].variables["params"]["stage0"]["block0"]
    assert trained["act_clips"].shape == (1, 3, 2)
    assert np.unique(trained["act_clips"]).size == 6
    capsys.readouterr()
    assert main(["certify", "runs/cut", "--bits", "3", "--images", "64"]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "symmetric" in line)
    assert float(row[-1]) >= 1  # bound over error


@pytest.mark.parametrize(
    "arguments", [("certify", "--bits", "8", "12"), ("report", "--certify", "12"), ("elastic", "--bits", "12")]
)
def test_widths_that_a_set_of_levels_does_not_have_are_refused(arguments, tmp_path, monkeypatch, capsys):
    experiment = Experiment("tiny", (Variant("plain"),), model=Model(levels="pot"))
    (tmp_path / "config.json").write_text(to_json(experiment))
    (tmp_path / "summary.json").write_text(json.dumps({"variants": {"plain": {}}}))
    model = qpde.models.create("resnet20", num_classes=10, levels="pot", weight_bits=4, act_bits=4)
    found = Finished("plain", qpde.TrainedNetwork(model, {}, ()), SimpleNamespace(), experiment)
    for module in ("certify", "report", "elastic"):
        monkeypatch.setattr(f"train.commands.{module}.read_finished", lambda *_: {"plain": found})
    assert main([arguments[0], str(tmp_path), *arguments[1:]]) == 2
    assert "levels 'pot' have no 12 bits: choose 2 to 8, or 16 and more" in capsys.readouterr().err
