"""The main job through its command line, on a network small enough for a test and on the real digits."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_runs import files, summary

import qpde
from qpde.bits import Bits
from qpde.datasets import load_digits
from train.commands.cli import COMMANDS, Command, load_recipes, main
from train.host.console import Display
from train.runs.checkpoints import Checkpoints
from train.runs.directory import open_run
from train.steps.paths import path_name
from train.trained.finished import read_finished

pytestmark = pytest.mark.usefixtures("compiled_once")


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
    whole = summary(tmp_path, "whole")
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
    assert summary(tmp_path, "cut") == whole
    again = [json.loads(line) for line in (tmp_path / "runs" / "cut" / "metrics.jsonl").read_text().splitlines()]
    without_time = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert without_time(again) == without_time(lines)

    # A finished run is refused, and nothing in it changes; --overwrite does what it says.
    monkeypatch.setattr(Display, "step", step)
    before = files(tmp_path)
    assert main(["run", config, "--name", "whole"]) == 2
    assert "holds a finished run: choose another --name, or --overwrite" in capsys.readouterr().err
    assert files(tmp_path) == before
    assert main(["run", config, "--name", "whole", "--overwrite", "--epochs", "1", "--only", "plain"]) == 0
    assert list(summary(tmp_path, "whole")) == ["plain"]
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
    result = summary(tmp_path, "exact")["plain"]
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
    assert summary(tmp_path)["symmetric"]["best_epoch"] == 3
    assert list(read_finished(tmp_path / "runs" / "tiny", None)) == ["symmetric"]
    assert main([*command, "--name", "short", "--epochs", "2"]) == 2
    assert "annealing.activations ends at 6 bits after 2 epochs" in capsys.readouterr().err


def test_a_network_is_distilled_and_then_tuned_by_similarity_alone_to_a_target(config, tmp_path, capsys):
    common = ["run", config, "--only", "symmetric"]
    options = "--loss.name distillation --loss.label-smoothing 0.1 --data.mixup 0.2 --optimizer.averaging 0.9"
    assert main([*common, "--epochs", "2", *options.split()]) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train_similarity"] > 0 for line in lines)
    assert 0 < summary(tmp_path)["symmetric"]["agreement"] <= 1

    options = "--loss.name similarity --optimizer.schedule constant --optimizer.learning-rate 0.01"
    tune = [*common, "--name", "tuned", *options.split(), "--loss.similarity-target", "1e9"]
    assert main(tune) == 2
    assert "tunes a trained network: give --start-from RUN" in capsys.readouterr().err
    assert main([*tune, "--start-from", "runs/tiny"]) == 0
    (line,) = (tmp_path / "runs" / "tuned" / "metrics.jsonl").read_text().splitlines()  # the target is met at once
    assert json.loads(line)["train_loss"] == pytest.approx(1e-5 * 256 * json.loads(line)["train_similarity"], rel=1e-4)
    assert summary(tmp_path, "tuned")["symmetric"]["best_epoch"] == 1

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
    before = files(tmp_path)
    try:
        status = main(["run", *arguments])
    except SystemExit as exit:  # tyro's own refusals
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert message.replace("\\", "") in captured.err + captured.out
    assert files(tmp_path) == before


def test_two_processes_cannot_work_in_one_run(config, tmp_path, capsys):
    from train.config.serialize import from_json

    experiment = load_recipes(tmp_path / "tiny.py")["fast"]
    with open_run(tmp_path / "runs", experiment) as held:
        assert from_json((held.path / "config.json").read_text()) == experiment
        assert main(["run", config]) == 2
        assert "another process works in" in capsys.readouterr().err


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
