"""Sweeps: means, intervals and the paired test by their definitions, and runs of a network small enough for a test."""

import json
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from tiny_runs import summary

from train.commands import sweep
from train.commands.cli import main
from train.commands.sweep import interval, paired_p
from train.config.images import Experiment, Variant
from train.tasks import lockstep

VALUES = st.lists(st.floats(-100, 100), min_size=3, max_size=8)


@given(values=VALUES)
def test_the_interval_is_that_of_student(values):
    mean, half = interval(values)
    n, m = len(values), sum(values) / len(values)
    s = (sum((v - m) ** 2 for v in values) / (n - 1)) ** 0.5
    assert mean == pytest.approx(m, abs=1e-9)
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1) * s / n**0.5, abs=1e-9)


def test_the_interval_covers_the_mean_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    found = [interval(rng.standard_normal(4)) for _ in range(2000)]
    covered = np.mean([abs(mean) <= half for mean, half in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


@given(values=VALUES, shift=st.floats(-5, 5))
def test_the_paired_test_sees_the_differences_only(values, shift):
    differences = np.arange(len(values)) + shift
    a = np.asarray(values)
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(len(a)))
    expected = 2 * stats.t.sf(abs(t), len(a) - 1)
    assert paired_p(a + differences, a) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert paired_p(a, a) == 1
    assert paired_p([1, 2, 3], [0, 1, 2]) == 0


@pytest.fixture
def started(monkeypatch):
    """The names of the cells that a sweep starts, in place of training them."""
    names = []
    monkeypatch.setattr(sweep, "prepare_job", lambda cell, **_: lambda console: names.append(cell.name))
    monkeypatch.setattr(sweep, "_report", lambda *_: None)
    return names


def test_widths_that_are_named_twice_are_one_cell(started, tmp_path):
    experiment = Experiment("tiny", (Variant("plain"),))
    options = sweep.Sweep(experiment, "fast", seeds=2, bits=("4", "W4A8", "W4A4"), at_once=1, runs_dir=tmp_path)
    sweep.prepare_sweep(options)(Console(quiet=True))
    assert started == ["W4A4_seed0", "W4A4_seed1", "W4A8_seed0", "W4A8_seed1"]


def test_without_bits_a_sweep_has_the_widths_of_the_model(started, tmp_path, capsys, pytestconfig):
    command = ["sweep", str(pytestconfig.rootpath / "configs" / "digits.py"), "--seeds", "1", "--at-once", "1"]
    command += ["--runs-dir", str(tmp_path)]
    assert main([*command, "--model.weight-bits", "3"]) == 0
    assert started == ["W3A4_seed0"]
    assert main([*command, "--model.weight_bits", "3", "--bits", "4"]) == 2
    assert "--model.weight-bits and --bits both give bits" in capsys.readouterr().err
    assert main([*command, "--model.act-bits", "None"]) == 2
    assert "not all variants are quantized alike: give some" in capsys.readouterr().err


def test_one_seed_has_a_mean_and_nothing_else():
    mean, half = interval([3.0])
    assert (mean, np.isnan(half), np.isnan(paired_p([1.0], [2.0]))) == (3.0, True, True)


@pytest.mark.usefixtures("compiled_once")
def test_a_sweep_is_one_table_of_runs_and_finished_ones_are_not_run_again(config, tmp_path, monkeypatch, capsys):
    sweep = ["sweep", config, "--symmetric", "both", "--epochs", "1", "--bits", "W3A4"]
    assert main([*sweep, "--seeds", "1"]) == 0
    folder = tmp_path / "runs" / "tiny_sweep"
    before = (folder / "W3A4_seed0" / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*sweep, "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "W3A4_seed1: 2 of 2" in printed
    assert "symmetric - plain" in printed
    assert (folder / "W3A4_seed0" / "summary.json").stat().st_mtime_ns == before
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    head, *lines = [line.split(",") for line in (folder / "sweep.csv").read_text().splitlines()]
    assert [line[:3] for line in lines] == [["W3A4", str(s), v] for s in (0, 1) for v in ("symmetric", "plain")]
    for line in lines:
        result = json.loads((folder / f"W3A4_seed{line[1]}" / "summary.json").read_text())["variants"][line[2]]
        assert float(line[head.index("accuracy")]) == result["accuracy"]
    assert lines[0][3:] != lines[2][3:]  # another seed, another network

    refused = {
        "(batch_size: 256 there, 128 now): choose another --name": ["--seeds", "2", "--batch-size", "128"],
        "seeds (=0) must be at least 1": ["--seeds", "0"],
        "neither like W4A8": ["--bits", "W4"],
    }
    for message, more in refused.items():
        assert main([*sweep, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("compiled_once")
def test_runs_trained_together_end_as_they_do_alone_and_share_one_compiled_step(config, tmp_path, monkeypatch, capsys):
    sweep = ["sweep", config, "--only", "symmetric", "--epochs", "1", "--seeds", "2", "--bits", "2", "W3A4"]
    names = [f"{widths}_seed{seed}" for widths in ("W2A2", "W3A4") for seed in (0, 1)]
    assert main([*sweep, "--name", "alone"]) == 0
    alone = [summary(tmp_path, f"alone_sweep/{name}")["symmetric"] for name in names]

    made = []

    class Together(lockstep.Together):
        def __init__(self, step):
            super().__init__(step)
            made.append(self)

    monkeypatch.setattr(lockstep, "Together", Together)
    assert main([*sweep, "--name", "whole", "--at-once", "4"]) == 0
    assert [together.program._cache_size() for together in made] == [1]
    whole = [summary(tmp_path, f"whole_sweep/{name}")["symmetric"] for name in names]
    for name, mine, other in zip(names, whole, alone, strict=True):
        assert mine["layer_error"] == pytest.approx(other["layer_error"], rel=0.02)
        losses = [
            json.loads((tmp_path / "runs" / folder / name / "metrics.jsonl").read_text())["train_loss"]
            for folder in ("whole_sweep", "alone_sweep")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len({result["mean_layer_error"] for result in whole}) == 4

    # Stopped in the middle of an epoch and taken up: the same to the last bit.
    class Interrupting(lockstep.Together):
        count = 0

        def __call__(self, trainings, batches):
            self.count += 1
            if self.count == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(trainings, batches)

    monkeypatch.setattr(lockstep, "Together", Interrupting)
    assert main([*sweep, "--name", "parts", "--at-once", "4"]) == 143
    assert "the same command continues from there" in capsys.readouterr().err
    monkeypatch.setattr(lockstep, "Together", Together)
    assert main([*sweep, "--name", "parts", "--at-once", "4"]) == 0
    assert [summary(tmp_path, f"parts_sweep/{name}")["symmetric"] for name in names] == whole

    assert main([*sweep, "--name", "other", "--at-once", "2", "--devices", "2"]) == 2
    assert "must be 1 where runs are trained together" in capsys.readouterr().err
