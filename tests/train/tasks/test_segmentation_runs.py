"""A segmentation run from its file to its page: what it learns, keeps and shows."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

import qpde
from qpde.models import Architecture, registry
from qpde.models.images.blocks import StableBlock
from qpde.pictures import read_picture
from train.commands.cli import main

RECIPE = """from qpde.models import Smoothing
from train.config.images import Optimizer, Variant
from train.config.segmentation import SegmentationData, SegmentationExperiment, SegmentationLoss, SegmentationModel

recipes = {{
    "fast": SegmentationExperiment(
        name="scenes",
        variants=(Variant("symmetric", {{"symmetric": True, "smoothing": Smoothing()}}),),
        data=SegmentationData("folder/{root}", smallest_scale=1.0, largest_scale=1.2, crop=(32, 32)),
        model=SegmentationModel("unet", encoder="tiny", stem_stride=2, weight_bits=4, act_bits=4),
        loss=SegmentationLoss(dice=0.5),
        optimizer=Optimizer("adam", learning_rate=0.01, schedule="constant"),
        epochs=2,
        batch_size=4,
    ),
}}
"""
CLASSES = ("left", "right")


@pytest.fixture(scope="module", autouse=True)
def optax_promotes():
    """optax's Adam raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twenty images whose dark and bright parts are two classes; a border without a class."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for i in range(20):
        edge = rng.integers(12, 36)
        labels = np.zeros((32, 48), np.uint8)
        labels[:, edge:] = 1
        pixels = np.clip(rng.normal(60 + 120 * labels[..., None], 8, (32, 48, 3)), 0, 255).astype(np.uint8)
        labels[0] = 255
        Image.fromarray(pixels).save(root / "images" / f"{i:02}.png")
        Image.fromarray(labels).save(root / "labels" / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def tiny():
    """An encoder of two stages. Every command below compiles its own programs of all blocks."""
    with pytest.MonkeyPatch.context() as patch:
        stages = ((8, 8, 1, 1, 1), (8, 8, 2, 2, 1))
        patch.setitem(registry.ARCHITECTURES, "tiny", Architecture("tiny", StableBlock, stages))
        yield


@pytest.fixture(scope="module")
def run(tiny, scenes, tmp_path_factory, compiled_once):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "scenes.py").write_text(RECIPE.format(root=scenes))
    assert main(["run", str(folder / "scenes.py"), "--runs-dir", str(folder)]) == 0
    return folder / "scenes"


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_run_is_judged_by_the_intersection_over_union_of_every_class(run):
    (result,) = json.loads((run / "summary.json").read_text())["variants"].values()
    assert set(result["iou"]) == set(CLASSES)
    assert result["mean_iou"] == pytest.approx(np.mean(list(result["iou"].values())))
    assert result["mean_iou"] > 0.55  # everything of one class: half of a half
    assert {"mean_iou_twin", "agreement", "accuracy", "mean_layer_error"} <= result.keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(line["validation_mean_iou"] for line in lines if "validation_mean_iou" in line)
    assert result["validation_mean_iou"] == best


def test_the_network_predicts_from_its_folder_and_writes_maps_of_a_photograph(run, scenes, tmp_path, capsys):
    network = qpde.load(run / "symmetric")
    picture = scenes / "images" / "09.png"
    wide = tmp_path / "wide.png"
    Image.fromarray(_pixels(picture)).resize((96, 64), Image.Resampling.NEAREST).save(wide)
    labels = network.predict(read_picture(wide, network.input_shape)[None])[0]
    assert main(["predict", str(run), str(wide), str(tmp_path / "none.png"), "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert "left" in out
    assert "none.png cannot be read" in err
    found = Image.fromarray(_pixels(tmp_path / "out" / "symmetric" / "wide_labels.png"))
    assert found.size == (96, 64)
    np.testing.assert_array_equal(found.resize((48, 32), Image.Resampling.NEAREST), labels)
    assert _pixels(tmp_path / "out" / "symmetric" / "wide_overlay.png").shape[:2] == (64, 96)


def test_the_report_shows_scenes_proofs_and_classes(run):
    assert main(["report", str(run), "--images", "1", "--bits", "4", "--certify", "4"]) == 0
    page = (run / "report" / "report.html").read_text()
    for text in (
        *("Scenes", "Proofs", "the same, unproven", "Intersection over union by class", "Smoothing", *CLASSES),
        *("Mean IoU and agreement against bits", "Validation mean IoU"),
    ):
        assert text in page


def test_its_pixels_are_certified_and_the_parts_of_the_bound_shown(run, capsys):
    assert main(["certify", str(run), "--bits", "4", "--images", "1", "--newton-steps", "20"]) == 0
    out = capsys.readouterr().out
    line = next(line.split() for line in out.splitlines() if "symmetric" in line and "%" in line)
    assert line[3] == line[4]  # as deep as the network, the proof is the twin: all that agree are certified
    assert "up0.block1" in out


def test_bits_are_compared_by_the_mean_intersection_over_union(run, capsys):
    (result,) = json.loads((run / "summary.json").read_text())["variants"].values()
    assert main(["elastic", str(run), "--bits", "4", "32"]) == 0
    assert "mean IoU, %" in capsys.readouterr().out
    with open(run / "elastic.csv") as file:
        first, last = csv.DictReader(file)
    assert float(first["mean_iou"]) == pytest.approx(result["mean_iou"])
    assert float(first["mean_iou_twin"]) == pytest.approx(result["mean_iou_twin"])
    assert last["mean_iou"] == last["mean_iou_twin"]
    assert main(["budget", str(run), "--bits", "4", "8", "--at", "4", "--images", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mean IoU" in next(line for line in lines if "bit-ops" in line)
    assert f"{result['mean_iou']:.2%}" in next(line for line in lines if "all alike" in line)


def test_its_files_are_measured_pixel_by_pixel(run):
    assert main(["export", str(run), "--images", "1", "--rounds", "0", "--format", "packed", "onnx"]) == 0
    found = json.loads((run / "export" / "symmetric" / "deployment.json").read_text())
    assert {row["runtime"] for row in found["runtimes"]} >= {"JAX, integers", "StableHLO"}
    assert all(row["differing"] == 0 for row in found["runtimes"] if row["runtime"] == "JAX, integers")
    assert "no C code" in found["missing"]["C"]
