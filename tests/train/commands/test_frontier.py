"""Finished runs side by side: which networks stand in the table and the picture, and what cannot be compared."""

import json
import shutil
from pathlib import Path

import pytest

from train.commands.cli import main
from train.config.graphs import GraphExperiment, GraphVariant
from train.config.images import Data, Experiment, Variant
from train.config.segmentation import SegmentationExperiment
from train.runs.directory import open_run


def result(accuracy, error, relative):
    errors = {"mean_layer_error": error, "mean_relative_layer_error": relative}
    return {"parameters": 1234, "accuracy": accuracy, "agreement": 0.9, **errors}


def finished(experiment, results):
    """A folder of such a run, whose training took no time."""
    with open_run(Path("runs"), experiment) as run:
        run.finish({"variants": results})


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Three runs on images, one of them on others, one on label maps and one on a graph."""
    monkeypatch.chdir(tmp_path)
    plain, symmetric = Variant("plain", {"symmetric": False}), Variant("symmetric", {"residual": "precise"})
    both = {"plain": result(0.8, 0.3, 0.1), "symmetric": result(0.7, 0.2, 0.2)}
    finished(Experiment("both", (plain, symmetric), epochs=7), both)
    better = result(0.9, 0.25, 0.3)
    full = {"parameters": 1234, "accuracy": 0.95}
    finished(Experiment("better", (plain, symmetric), epochs=7), {"plain": better, "symmetric": full})
    finished(Experiment("exact", (plain,)), {"plain": full})
    finished(Experiment("other", (plain,), data=Data("cifar10")), {"plain": better})
    finished(SegmentationExperiment("scenes", (plain,)), {"plain": better | {"mean_iou": 0.5}})
    finished(GraphExperiment("graph", (GraphVariant("gcn", {"name": "gcn"}),)), {"gcn": {"parameters": 1}})


def rows(out):
    lines = [line.split() for line in out.splitlines()]
    return {(cells[0], cells[1]): cells[2:] for cells in lines if len(cells) > 6 and cells[0] != "run"}


def test_the_quantized_networks_of_all_runs_stand_in_one_table_and_the_best_are_marked(capsys):
    assert main(["frontier", "runs/both", "runs/better", "--output", "runs/all.png"]) == 0
    found = rows(capsys.readouterr().out)
    assert found == {
        ("both", "plain"): ["1,234", "7", "80.00%", "90.00%", "0.3000", "0.1000", "r"],
        ("both", "symmetric"): ["1,234", "7", "70.00%", "90.00%", "0.2000", "0.2000", "a"],
        ("better", "plain"): ["1,234", "7", "90.00%", "90.00%", "0.2500", "0.3000", "a", "r"],
    }
    assert Path("runs/all.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_stands_for_its_runs_where_they_are_gone(capsys):
    assert main(["frontier", "runs/both", "runs/better", "--output", "runs/all.png"]) == 0
    whole = rows(capsys.readouterr().out)
    assert main(["frontier", "runs/both", "--output", "both.svg"]) == 0
    shutil.rmtree("runs/both")
    capsys.readouterr()
    for again in (["both.json", "runs/better"], ["runs/better", "both.json", "runs/all.json"]):
        assert main(["frontier", *again, "--output", "again.png"]) == 0
        assert rows(capsys.readouterr().out) == whole
        assert sorted(json.loads(Path("again.json").read_text())["rows"], key=str) == sorted(
            json.loads(Path("runs/all.json").read_text())["rows"], key=str
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is no table of this command"),
        ("[]", "is no table of this command"),
        ({"images": "cifar10"}, "tested on digits and cifar10"),
        ({"share": "mood"}, "share (='mood') must be one of accuracy, mean_iou"),
        ({"share": "mean_iou"}, "compare runs"),
        ({"rows": [{"run": "a"}]}, "is no table of this command"),
        ({"error": -1.0}, "error (=-1.0) must be finite"),
        ({"epochs": "7"}, "epochs (='7') must be of type int"),
    ],
    ids=str,
)
def test_a_damaged_table_is_refused(change, message, capsys):
    assert main(["frontier", "runs/both", "--output", "both.png"]) == 0
    table = json.loads(Path("both.json").read_text())
    if isinstance(change, dict):
        target = table if change.keys() <= table.keys() else table["rows"][0]
        target.update(change)
        change = json.dumps(table)
    Path("both.json").write_text(change)
    capsys.readouterr()
    assert main(["frontier", "both.json", "runs/both", "--output", "again.png"]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path("again.png").exists()


def test_segmentation_networks_are_compared_by_their_mean_intersection_over_union(capsys):
    assert main(["frontier", "runs/scenes", "--output", "runs/scenes.svg"]) == 0
    out = capsys.readouterr().out
    assert "mean IoU" in out
    assert rows(out)["scenes", "plain"][2] == "50.00%"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the folders of finished runs"),
        (["runs/both", "runs/nowhere"], "is no folder of a run"),
        (["runs/both", "runs/other"], "were tested on cifar10 and digits"),
        (["runs/graph"], "trained on a graph"),
        (["runs/exact"], "quantize one first"),
        (["runs/both", "--output", "all.txt"], "must end with .png"),
        (["runs/both", "--output", "nowhere/all.png"], "lies in no folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(arguments, message, capsys):
    assert main(["frontier", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*.png"))
