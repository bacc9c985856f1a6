"""Means, intervals and the paired test of a sweep, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from train.commands import sweep
from train.commands.cli import main
from train.commands.sweep import interval, paired_p
from train.config.images import Experiment, Variant

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
