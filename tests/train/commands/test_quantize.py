"""Full-precision runs quantized by one command, on a network small enough for a test."""

import pytest
from tiny_runs import files, summary

from train.commands.cli import main
from train.config.images import Experiment, Model, Variant
from train.config.serialize import to_json
from train.runs.directory import open_run

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_a_full_precision_run_is_quantized_by_one_command(config, tmp_path, capsys):
    assert main(["run", config, "--recipe", "full_precision"]) == 0
    assert "training time" in capsys.readouterr().out
    assert main(["quantize", "runs/exact", "--bits", "32", "W8A4", "--per-channel", "--images", "300"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy, full-precision start" in printed
    assert "8 and 4" in printed
    exact, wide, few = (summary(tmp_path, name)["plain"] for name in ("exact", "exact_W32A32", "exact_W8A4"))
    assert wide["accuracy"] == wide["accuracy_start"] == few["accuracy_start"]
    assert wide["accuracy"] == pytest.approx(exact["accuracy"], abs=1e-6)
    assert wide["agreement_start"] == 1
    assert few["best_epoch"] == 0
    assert "training time" not in printed
    assert 0.5 < few["agreement_start"] <= 1
    assert few["mean_layer_error"] > 0

    # It is a run like any other: cut off before its end it is taken up, repeated, and trained further.
    (tmp_path / "runs" / "exact_W8A4" / "summary.json").unlink()
    assert main(["quantize", "runs/exact", "--bits", "W8A4", "--per-channel", "--images", "300"]) == 0
    assert summary(tmp_path, "exact_W8A4")["plain"] == few
    assert main(["reproduce", "runs/exact_W8A4"]) == 0
    capsys.readouterr()
    assert main(["quantize", "runs/exact_W8A4", "--bits", "4"]) == 2
    assert "trained in full precision, and start_from has one of 8-bit weights" in capsys.readouterr().err

    further = ["run", config, "--only", "plain", "--name", "more", "--start-from", "runs/exact_W8A4", "--epochs", "1"]
    assert main([*further, "--model.per-channel"]) == 2
    assert "quantized with model.standardize=False: give --model.no-standardize" in capsys.readouterr().err
    assert main([*further, "--model.per-channel", "--model.no-standardize"]) == 0
    broken = [*further[:4], "--name", "broken", "--start-from", "runs/exact", "--optimizer.learning-rate", "1e30"]
    for options in ([], ["--model.no-standardize"]):
        assert main([*broken, *options, "--overwrite"]) == 1
        assert ("started from kernels without standardization" in capsys.readouterr().err) == (not options)

    cases = {
        "neither like W4A8": ["runs/exact", "--bits", "W4"],
        "must lie in 2 to 32": ["runs/exact", "--bits", "1"],
        "absent is no folder of a run": ["absent", "--bits", "4"],
        "images (=0) must be at least 1": ["runs/exact", "--bits", "4", "--images", "0"],
        "another experiment (calibration.images: 300 there, 1024 now; ": ["runs/exact", "--bits", "W8A4"],
    }
    for message, arguments in cases.items():
        assert main(["quantize", *arguments]) == 2
        assert message in capsys.readouterr().err
    for command in ("certify", "elastic", "budget"):
        assert main([command, "runs/exact"]) == 2
        assert "`quantize` the run first" in capsys.readouterr().err


@pytest.fixture
def quantized(tmp_path, monkeypatch):
    """The arguments of `quantize` for a full-precision run, made up, and the names of the runs that it starts."""
    full = Experiment("full", (Variant("plain"),), model=Model(weight_bits=None, act_bits=None))
    run = tmp_path / "full"
    run.mkdir()
    (run / "config.json").write_text(to_json(full))
    (run / "summary.json").write_text('{"variants": {"plain": {}}}')
    started = []

    def prepare(experiment, *, runs_dir, overwrite, **_):
        def job(console):
            started.append(experiment.name)
            folder.path.joinpath("summary.json").write_text("{}")

        with open_run(runs_dir, experiment, overwrite=overwrite) as folder:
            return job

    monkeypatch.setattr("train.commands.quantize.prepare_job", prepare)
    return ["quantize", str(run), "--runs-dir", str(tmp_path / "runs"), "--bits"], started


def test_quantize_goes_on_with_the_widths_that_are_missing(quantized, tmp_path, capsys):
    command, started = quantized
    assert main([*command, "W4A4", "4"]) == 0  # twice the same
    assert main([*command, "W8A8", "W4A4"]) == 0
    assert started == ["full_W4A4", "full_W8A8"]
    assert f"{tmp_path}/runs/full_W4A4 is finished" in capsys.readouterr().out

    before = files(tmp_path)
    assert main([*command, "W2A2", "W4A4", "--images", "5"]) == 2  # before the first folder is made
    assert "full_W4A4 holds a run of another experiment (calibration.images: 1024 there, 5 now): choose another " in (
        error := capsys.readouterr().err
    )
    assert "--runs-dir, or --overwrite to delete it" in error
    assert main([*command, "W2A2", "W1"]) == 2
    assert files(tmp_path) == before
    assert main([*command, "W4A4", "--images", "5", "--overwrite"]) == 0
    assert started[2:] == ["full_W4A4"]
