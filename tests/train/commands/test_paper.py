"""The paper's experiments, as far as the time reaches."""

import dataclasses
import signal
import threading
import time
from pathlib import Path

import pytest

from qpde import models
from train.commands import paper
from train.commands.cli import main
from train.config.graphs import GraphExperiment, GraphModel, GraphVariant
from train.config.recipe_files import load_recipes
from train.config.serialize import to_json
from train.host.interrupt import Interrupted, StopRequest
from train.runs.directory import open_run

EXPERIMENT = GraphExperiment(
    "one", variants=(GraphVariant("symmetric-2"),), model=GraphModel(layers=1, width=4), bits=(), epochs=2, seeds=2
)
RESULT = {"parameters": 1234, "full": {"accuracy": [0.5, 0.7], "energy": [[1.0], [1.0]], "best_epoch": [1, 2]}}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A file of three experiments, whose trainings take no time, and the names of those that were begun."""
    monkeypatch.chdir(tmp_path)
    texts = [to_json(dataclasses.replace(EXPERIMENT, name=name)) for name in ("one", "two", "three")]
    lines = ["from train.config.serialize import from_json", f"found = map(from_json, {texts!r})"]
    Path("paper.py").write_text("\n".join([*lines, "recipes = {found.name + '_recipe': found for found in found}", ""]))
    begun, waits = [], threading.Event()

    def passes(seconds, done):
        while not (waits.is_set() or done.wait(0.01)):
            pass
        return seconds < 1 and not done.is_set()

    def prepare(experiment, *, data_dir, runs_dir):
        def job(console):
            begun.append(experiment.name)
            with open_run(runs_dir, experiment) as run:
                run.log(variant="symmetric-2", epoch=1)
                if experiment.name == "two" and slow:
                    if slow[0] == "outside":
                        waits.set()
                        raise Interrupted("saved", signal.SIGTERM)
                    with StopRequest() as stop:
                        waits.set()
                        while not stop.signal_number:
                            time.sleep(0.01)
                    raise Interrupted("saved", stop.signal_number)
                run.finish({"variants": {"symmetric-2": RESULT}})

        return job

    slow = ["time"]
    monkeypatch.setattr(paper, "prepare_job", prepare)
    monkeypatch.setattr(paper, "_passes", passes)
    monkeypatch.setattr(paper, "_AGAIN", 0.05)
    return begun, slow


def test_what_is_finished_is_not_repeated_and_what_did_not_fit_is_listed(started, capsys):
    begun, slow = started
    before = signal.getsignal(signal.SIGTERM)
    assert main(["paper", "paper.py", "--minutes", "0.005"]) == 0
    assert begun == ["one", "two"]  # the second one is stopped when the time is over
    assert "1 of 3 experiments are finished" in capsys.readouterr().out
    text = Path("runs/paper/results.md").read_text()
    assert "`python -m train run paper.py --recipe one_recipe --runs-dir runs/paper`" in text
    assert "| symmetric-2 | 1,234 | full | 60.0±14.1 |" in text
    assert "- two: begun; symmetric-2 after epoch 1 of 2\n- three: not begun" in text

    slow.clear()
    assert main(["paper", "paper.py"]) == 0
    assert begun == ["one", "two", "two", "three"]
    text = Path("runs/paper/results.md").read_text()
    assert "## three" in text
    assert "Not run" not in text
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_from_outside_is_no_end_of_the_time(started, capsys):
    started[1][:] = ["outside"]
    assert main(["paper", "paper.py"]) == 143
    assert "saved" in capsys.readouterr().err
    assert not Path("runs/paper/results.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes (=0.0) must be positive"),
        (["absent.py"], "there is no experiment file absent.py"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path, monkeypatch, capsys, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert main(["paper", *arguments, "--runs-dir", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_papers_list_is_complete_and_each_has_a_folder_of_its_own(pytestconfig):
    recipes = load_recipes(pytestconfig.rootpath / "configs" / "paper.py")
    assert len({experiment.name for experiment in recipes.values()}) == len(recipes) == 12
    experiment = recipes["cifar10_resnet20_published_0"]
    assert [v.name for v in experiment.variants] == ["plain", "symmetric", "tied", "spectral", "tied-wide"]

    def parameters(variant):
        options = dataclasses.asdict(experiment.model_of(variant))
        return models.summary(models.create(options.pop("name"), num_classes=10, **options), (32, 32, 3)).parameters

    plain, *_, wide = experiment.variants
    assert parameters(wide) == pytest.approx(parameters(plain), rel=0.01)
