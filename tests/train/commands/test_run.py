"""The main job through its command line, on a network small enough for a test and on the real digits."""

import csv
import json
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import qpde
from qpde.bits import Bits
from qpde.datasets import load_digits
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import COMMANDS, Command, load_recipes, main
from train.config.images import Experiment, Model, Variant
from train.config.serialize import to_json
from train.host.console import Display
from train.runs.checkpoints import Checkpoints
from train.runs.directory import open_run
from train.steps.paths import path_name
from train.tasks import lockstep
from train.trained.finished import Finished, read_finished

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = """
from train.config import Data, Experiment, Model, Optimizer, Rule, Variant

tiny = Experiment(
    name="tiny",
    variants=(Variant("symmetric"), Variant("plain", {"symmetric": False})),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny"),
    optimizer=Optimizer(rules=(Rule("clip", weight_decay=0.0),)),
    epochs=3,
    batch_size=256,
    clip_start="rms",
)
recipes = {"fast": tiny, "full_precision": Experiment(
    name="exact",
    variants=(Variant("plain", {"symmetric": False, "weight_bits": None, "act_bits": None}),),
    data=tiny.data,
    model=tiny.model,
    epochs=1,
    batch_size=256,
)}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A file of recipes for a network of two blocks, in a fresh folder that is also the working directory."""
    architecture = Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),))
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", architecture)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    return "tiny.py"


def _summary(tmp_path, name="tiny"):
    """The results without what the clock adds."""
    variants = json.loads((tmp_path / "runs" / name / "summary.json").read_text())["variants"]
    return {name: {k: v for k, v in result.items() if k != "training_seconds"} for name, result in variants.items()}


def _files(tmp_path):
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def test_a_run_leaves_everything_and_an_interrupted_one_ends_the_same(config, tmp_path, monkeypatch, capsys):
    assert main(["run", config, "--name", "whole"]) == 0
    printed = capsys.readouterr().out
    for words in ("symmetric", "plain", "agreement with the twin", "layer-wise error, relative", "4 and 4"):
        assert words in printed

    run = tmp_path / "runs" / "whole"
    assert {"config.json", "metrics.jsonl", "summary.json", "layer_error.png", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    assert (run / "layer_error.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["variant"], line["epoch"]) for line in lines] == [
        (variant, epoch) for variant in ("symmetric", "plain") for epoch in (1, 2, 3)
    ]
    assert lines[2]["train_loss"] < lines[0]["train_loss"]
    whole = _summary(tmp_path, "whole")
    for result in whole.values():
        assert 0 <= result["accuracy"] <= 1
        assert 0 <= result["agreement"] <= 1
        assert len(result["layer_error"]) == len(result["relative_layer_error"]) == 2
        assert result["samples"] == 320
    assert whole["symmetric"]["parameters"] < whole["plain"]["parameters"]
    for name, result in whole.items():
        mine = [line for line in lines if line["variant"] == name]
        best = max(mine, key=lambda line: (line["validation_accuracy"], -line["validation_loss"]))
        with Checkpoints(run / "checkpoints" / name) as checkpoints:
            assert (checkpoints.last_step, checkpoints.best_step) == (15, best["step"])
        assert result["best_epoch"] == best["epoch"]

    # What was trained loads without the run or its data, and is what was measured.
    moved = tmp_path / "elsewhere"
    shutil.copytree(run / "plain", moved)
    digits = load_digits(size=8)
    loaded = qpde.load(moved)
    assert loaded.classes == digits.classes
    assert loaded.about["seed"] == 0
    right = loaded.predict(digits.test.images) == digits.test.labels
    assert right.mean() == pytest.approx(whole["plain"]["accuracy"], abs=2e-3)

    # The same run, cut off in the second epoch of each variant: five steps an epoch, so at the steps 8 and 16.
    steps, step = [], Display.step

    def interrupt(display):
        steps.append(1)
        if len(steps) in (8, 18):
            raise KeyboardInterrupt
        step(display)

    monkeypatch.setattr(Display, "step", interrupt)
    assert main(["run", config, "--name", "cut"]) == 130
    assert "same command continues" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "cut" / "summary.json").exists()
    assert main(["run", config, "--name", "cut", "--epochs", "4"]) == 2
    assert "epochs: 3 there, 4 now" in capsys.readouterr().err
    with open(tmp_path / "runs" / "cut" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(lines[1]) + '\n{"variant": "symmet')  # logged, never saved; and a line cut short
    statuses = [main(["run", config, "--name", "cut"]) for _ in range(2)]
    assert sorted(statuses) == [0, 130]
    assert "going on after step 5 of 15" in capsys.readouterr().out
    assert _summary(tmp_path, "cut") == whole
    again = [json.loads(line) for line in (tmp_path / "runs" / "cut" / "metrics.jsonl").read_text().splitlines()]
    without_time = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert without_time(again) == without_time(lines)

    # A finished run is refused, and nothing in it changes; --overwrite does what it says.
    monkeypatch.setattr(Display, "step", step)
    before = _files(tmp_path)
    assert main(["run", config, "--name", "whole"]) == 2
    assert "holds a finished run: choose another --name, or --overwrite" in capsys.readouterr().err
    assert _files(tmp_path) == before
    assert main(["run", config, "--name", "whole", "--overwrite", "--epochs", "1", "--only", "plain"]) == 0
    assert list(_summary(tmp_path, "whole")) == ["plain"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["plain"]


def test_a_network_in_full_precision_has_accuracy_and_nothing_to_be_faithful_to(config, tmp_path, monkeypatch, capsys):
    import train.tasks.images as application

    traced, first_variables = [], application._first_variables

    def count(*arguments, **options):
        traced.append(1)
        return first_variables(*arguments, **options)

    monkeypatch.setattr(application, "_first_variables", count)
    assert main(["run", config, "--recipe", "full_precision"]) == 0
    assert len(traced) == 1  # for the checks and for the start
    assert "32 and 32" in capsys.readouterr().out
    result = _summary(tmp_path, "exact")["plain"]
    assert "agreement" not in result
    assert 0 <= result["accuracy"] <= 1
    assert not (tmp_path / "runs" / "exact" / "layer_error.png").exists()


def test_widths_are_annealed_in_one_compiled_step_and_the_best_epoch_has_the_last_ones(
    config, tmp_path, monkeypatch, capsys
):
    import train.tasks.images as application

    traced, reestimated = [], []
    make_train_step, reestimate = application.make_train_step, application.reestimate_statistics
    make_epoch_step = application.make_epoch_step

    def counted(*arguments, **options):
        step = make_train_step(*arguments, **options)
        return lambda *inner: traced.append(1) or step(*inner)

    def guarded(*arguments, **options):
        step = make_epoch_step(*arguments, **options)

        def call(*inner):
            with jax.transfer_guard("disallow"):
                return step(*inner)

        return call

    def noted(model, variables, batches, bits):
        reestimated.append(bits)
        return reestimate(model, variables, batches, bits)

    monkeypatch.setattr(application, "make_train_step", counted)
    monkeypatch.setattr(application, "make_epoch_step", guarded)  # the widths lie on the device, too
    monkeypatch.setattr(application, "reestimate_statistics", noted)
    annealing = "--annealing.weights.schedule staircase --annealing.weights.start 5 --annealing.weights.every 1"
    annealing += " --annealing.activations.schedule listed --annealing.activations.bits 8 6"
    annealing += " --annealing.activations.every 1 --annealing.reestimate"
    command = ["run", config, "--only", "symmetric", *annealing.split()]
    assert main(command) == 0
    assert len(traced) == 1
    # Before each validation, at each change, and before the test images for the network and its twin.
    epochs = [Bits(5, 8), Bits(4, 6), Bits(4, 6), Bits(4, 4), Bits(4, 4)]
    assert reestimated == [*epochs, Bits(4, 4), Bits(4, 32)]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["weight_bits"], line["act_bits"]) for line in lines] == [(5, 8), (4, 6), (4, 4)]
    assert _summary(tmp_path)["symmetric"]["best_epoch"] == 3
    assert list(read_finished(tmp_path / "runs" / "tiny", None)) == ["symmetric"]
    assert main([*command, "--name", "short", "--epochs", "2"]) == 2
    assert "annealing.activations ends at 6 bits after 2 epochs" in capsys.readouterr().err


def test_a_network_is_distilled_and_then_tuned_by_similarity_alone_to_a_target(config, tmp_path, capsys):
    common = ["run", config, "--only", "symmetric"]
    options = "--loss.name distillation --loss.label-smoothing 0.1 --data.mixup 0.2 --optimizer.averaging 0.9"
    assert main([*common, "--epochs", "2", *options.split()]) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train_similarity"] > 0 for line in lines)
    assert 0 < _summary(tmp_path)["symmetric"]["agreement"] <= 1

    options = "--loss.name similarity --optimizer.schedule constant --optimizer.learning-rate 0.01"
    tune = [*common, "--name", "tuned", *options.split(), "--loss.similarity-target", "1e9"]
    assert main(tune) == 2
    assert "tunes a trained network: give --start-from RUN" in capsys.readouterr().err
    assert main([*tune, "--start-from", "runs/tiny"]) == 0
    (line,) = (tmp_path / "runs" / "tuned" / "metrics.jsonl").read_text().splitlines()  # the target is met at once
    assert json.loads(line)["train_loss"] == pytest.approx(1e-5 * 256 * json.loads(line)["train_similarity"], rel=1e-4)
    assert _summary(tmp_path, "tuned")["symmetric"]["best_epoch"] == 1

    refused = {
        "holds no trained network": ["--start-from", "absent"],
        "has another network: batch_stats/stage0/": ["--start-from", "runs/tiny", "--model.norm", "tied"],
        "give the model act_bits": ["--loss.name", "distillation", "--model.act-bits", "None"],
    }
    for message, more in refused.items():
        assert main([*common, "--name", "other", *more]) == 2
        assert message in capsys.readouterr().err


def test_training_starts_from_a_network_in_full_precision_with_clips_read_off_a_batch(config, tmp_path):
    assert main(["run", config, "--recipe", "full_precision"]) == 0
    options = "--only plain --start-from runs/exact --epochs 1 --optimizer.learning-rate 1e-12"
    assert main(["run", config, *options.split()]) == 0
    before, after = (qpde.load(tmp_path / "runs" / name / "plain").variables["params"] for name in ("exact", "tiny"))
    before, after = ({path_name(k): v for k, v in jax.tree.leaves_with_path(params)} for params in (before, after))
    assert before.keys() == after.keys()
    for name, value in after.items():
        if name.endswith("clips"):
            assert np.all(np.asarray(value) != np.asarray(before[name]))
        else:
            np.testing.assert_allclose(value, before[name], atol=1e-6)  # steps of nearly no length


def test_a_run_goes_on_with_its_clips_or_with_new_ones(config):
    assert main(["run", config, "--only", "plain", "--epochs", "1"]) == 0
    again = ["run", config, "--only", "plain", "--start-from", "runs/tiny", "--epochs", "0", "--clip-start", "mse"]
    assert main([*again, "--name", "kept"]) == 0
    assert main([*again, "--name", "anew", "--reset-clips"]) == 0

    def params(name):
        leaves = jax.tree.leaves_with_path(qpde.load(f"runs/{name}/plain").variables["params"])
        return {path_name(path): leaf for path, leaf in leaves}

    start, kept, anew = map(params, ("tiny", "kept", "anew"))
    for name, value in start.items():
        np.testing.assert_array_equal(kept[name], value)
        assert np.array_equal(anew[name], value) == ("clips" not in name)


def test_a_full_precision_run_is_quantized_by_one_command(config, tmp_path, capsys):
    assert main(["run", config, "--recipe", "full_precision"]) == 0
    assert "training time" in capsys.readouterr().out
    assert main(["quantize", "runs/exact", "--bits", "32", "W8A4", "--per-channel", "--images", "300"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy, full-precision start" in printed
    assert "8 and 4" in printed
    exact, wide, few = (_summary(tmp_path, name)["plain"] for name in ("exact", "exact_W32A32", "exact_W8A4"))
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
    assert _summary(tmp_path, "exact_W8A4")["plain"] == few
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

    before = _files(tmp_path)
    assert main([*command, "W2A2", "W4A4", "--images", "5"]) == 2  # before the first folder is made
    assert "full_W4A4 holds a run of another experiment (calibration.images: 1024 there, 5 now): choose another " in (
        error := capsys.readouterr().err
    )
    assert "--runs-dir, or --overwrite to delete it" in error
    assert main([*command, "W2A2", "W1"]) == 2
    assert _files(tmp_path) == before
    assert main([*command, "W4A4", "--images", "5", "--overwrite"]) == 0
    assert started[2:] == ["full_W4A4"]


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
    assert shares["4"][0] == pytest.approx(100 * _summary(tmp_path)["symmetric"]["accuracy"], abs=1)
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
    assert float(rows["W4A4"]["accuracy"]) == pytest.approx(_summary(tmp_path)["symmetric"]["accuracy"], abs=1 / 320)
    assert float(rows["W4A4"]["agreement"]) == pytest.approx(_summary(tmp_path)["symmetric"]["agreement"], abs=1 / 320)
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
    assert _summary(tmp_path, "cut") == _summary(tmp_path, "whole")
    lines = [json.loads(line) for line in (tmp_path / "runs" / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["weight_bits"], line["act_bits"]) for line in lines] == [(4, 4)] * 2

    trained = read_finished(tmp_path / "runs" / "cut", None)["symmetric"].variables["params"]["stage0"]["block0"]
    assert trained["act_clips"].shape == (1, 3, 2)
    assert np.unique(trained["act_clips"]).size == 6
    capsys.readouterr()
    assert main(["certify", "runs/cut", "--bits", "3", "--images", "64"]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "symmetric" in line)
    assert float(row[-1]) >= 1  # bound over error


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


def test_runs_trained_together_end_as_they_do_alone_and_share_one_compiled_step(config, tmp_path, monkeypatch, capsys):
    sweep = ["sweep", config, "--only", "symmetric", "--epochs", "1", "--seeds", "2", "--bits", "2", "W3A4"]
    names = [f"{widths}_seed{seed}" for widths in ("W2A2", "W3A4") for seed in (0, 1)]
    assert main([*sweep, "--name", "alone"]) == 0
    alone = [_summary(tmp_path, f"alone_sweep/{name}")["symmetric"] for name in names]

    made = []

    class Together(lockstep.Together):
        def __init__(self, step):
            super().__init__(step)
            made.append(self)

    monkeypatch.setattr(lockstep, "Together", Together)
    assert main([*sweep, "--name", "whole", "--at-once", "4"]) == 0
    assert [together.program._cache_size() for together in made] == [1]
    whole = [_summary(tmp_path, f"whole_sweep/{name}")["symmetric"] for name in names]
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
    assert [_summary(tmp_path, f"parts_sweep/{name}")["symmetric"] for name in names] == whole

    assert main([*sweep, "--name", "other", "--at-once", "2", "--devices", "2"]) == 2
    assert "must be 1 where runs are trained together" in capsys.readouterr().err


def test_a_step_that_breaks_down_ends_the_run_with_its_number_the_layer_and_the_clips(config, tmp_path, capsys):
    assert main(["run", config, "--only", "plain", "--optimizer.learning-rate", "1e30"]) == 1
    error = capsys.readouterr().err
    assert "plain: step" in error
    assert "(epoch 1) broke down: the output of block" in error
    assert "clips before it: stage0/block" in error
    assert not (tmp_path / "runs" / "tiny" / "summary.json").exists()


def test_a_trained_network_that_cannot_be_measured_ends_the_run_with_the_reason(config, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError("activations of block 0 are NaN or infinite")

    monkeypatch.setattr("train.tasks.images.compare", refuse)
    assert main(["run", config, "--only", "plain", "--epochs", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: plain: training diverged")
    assert "activations of block 0 are NaN or infinite. Try a smaller --optimizer.learning-rate" in error
    assert not (tmp_path / "runs" / "tiny" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an experiment first"),
        (["absent.py"], "there is no experiment file absent.py"),
        (["other.py"], "must define `recipes`"),
        (["tiny.py", "--recipe", "slow"], r"no recipe 'slow': choose from \['fast', 'full_precision'\]"),
        (["tiny.py", "--model.name", "resnet21"], "resnet21"),
        (["tiny.py", "--model.act-bits", "1"], "act_bits"),
        (["tiny.py", "--model.step-size", "-1"], "step_size"),
        (["tiny.py", "--clip-start", "guess"], "guess"),
        (["tiny.py", "--batch-size", "2000"], r"batch_size \(=2000\) exceeds the 1280 training images"),
        (["tiny.py", "--data.size", "9"], r"\(=9\) must be 8, 16 or 32"),
        (["tiny.py", "--data.name", "cifar10"], "give --data-dir or set QPDE_DATA_DIR"),
        (["tiny.py", "--data.name", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        (["tiny.py", "--name", "../elsewhere"], "names a folder"),
        (["tiny.py", "--epochs", "many"], "many"),
        (["tiny.py", "--colour", "red"], "colour"),
        (["tiny.py", "other.py"], "other.py"),
        (["tiny.py", "--runs-dir", "taken"], "holds something that is not a run"),
    ],
)
def test_bad_input_is_refused_with_its_reason_and_nothing_written(
    config, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.delenv("QPDE_DATA_DIR", raising=False)
    (tmp_path / "other.py").write_text("experiment = 1\n")
    (tmp_path / "taken" / "tiny").mkdir(parents=True)
    (tmp_path / "taken" / "tiny" / "notes.txt").write_text("mine")
    before = _files(tmp_path)
    try:
        status = main(["run", *arguments])
    except SystemExit as exit:  # tyro's own refusals
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert message.replace("\\", "") in captured.err + captured.out
    assert _files(tmp_path) == before


def test_two_processes_cannot_work_in_one_run(config, tmp_path, capsys):
    from train.config.serialize import from_json
    from train.runs.directory import open_run

    experiment = load_recipes(tmp_path / "tiny.py")["fast"]
    with open_run(tmp_path / "runs", experiment) as held:
        assert from_json((held.path / "config.json").read_text()) == experiment
        assert main(["run", config]) == 2
        assert "another process works in" in capsys.readouterr().err


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


@pytest.mark.parametrize("place", ["prepare", "work"])
def test_ctrl_c_is_an_error_of_one_line_wherever_it_comes(place, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    prepare = {"prepare": interrupt, "work": lambda arguments: interrupt}[place]
    monkeypatch.setitem(COMMANDS, "run", Command(prepare, "", ""))
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "error: interrupted: the same command continues after the last saved step\n"


def test_help_lists_the_commands_and_the_options_with_the_experiments_defaults(config, capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command.usage in printed and command.summary in printed for command in COMMANDS.values())
    assert main(["dance"]) == 2
    assert f"choose from {list(COMMANDS)}" in capsys.readouterr().err
    for name, words in (("run", "run configs/digits.py"), ("sweep", "RUNS_DIR/NAME_sweep"), ("data", "data prepare")):
        assert main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert COMMANDS[name].usage in printed
        assert words in printed
    with pytest.raises(SystemExit) as exit:
        main(["run", config, "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for words in ("--optimizer.learning-rate", "(default: 3)", "--overwrite", "--model.act-bits", "run tiny.py"):
        assert words in printed


@pytest.mark.parametrize("name", ["digits", "cifar10_resnet20", "cifar10_resnet56", "cifar10_mobilenetv2"])
def test_every_experiment_file_names_its_command_and_has_known_recipes(name, pytestconfig):
    path = pytestconfig.rootpath / "configs" / f"{name}.py"
    assert path.read_text().startswith(f'"""python -m train run configs/{name}.py')
    recipes = load_recipes(path)
    assert next(iter(recipes)) == "fast"
    assert [variant.name for variant in recipes["fast"].variants][:2] == ["symmetric", "plain"]
    if name != "digits":
        published = recipes["published"]
        assert (published.epochs, published.batch_size, published.optimizer.schedule) == (200, 128, "cosine")
        assert (published.optimizer.learning_rate, published.optimizer.weight_decay) == (0.1, 1e-4)
