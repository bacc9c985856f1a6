"""Own pictures from `run` to `predict`: every command works on such a run, from every directory."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import main

ROOT = Path(__file__).parents[3]
TINY = registry.Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),))
OPTIONS = ["--only", "plain", "--epochs", "1", "--batch-size", "16", "--data.size", "12"]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def home(tmp_path_factory, compiled_once):
    """A folder with pictures of two classes, dark above or dark below, and a full-precision run on them."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for i in range(80):
        path = home / "pictures" / ("above", "below")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(14, 24, 2)
        ramp = np.linspace(0, 200, height)[:: 1 if i % 2 == 0 else -1, None, None]
        pixels = ramp + rng.integers(0, 56, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ARCHITECTURES, "resnet20", TINY)
        patch.chdir(home)
        config = str(ROOT / "configs/own_pictures.py")  # whose pictures are in the folder of this name
        bits = ["--model.weight-bits", "None", "--model.act-bits", "None"]
        assert main(["run", config, *OPTIONS, *bits]) == 0
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        patch.chdir(elsewhere)
        assert main(["quantize", str(home / "runs/own_pictures"), "--bits", "W4A4"]) == 0
        shutil.move(elsewhere / "runs/own_pictures_W4A4", home / "runs/own_pictures_W4A4")
        yield home


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("certify RUN_W4A4 --bits 8 --images 4", "4 test images"),
        ("budget RUN_W4A4 --bits 2 4 --at 4 --images 16", "all alike"),
        ("report RUN_W4A4 --bits 4 --certify 8 --images 4", "report.html"),
        ("reproduce RUN", "identical to"),
    ],
)
def test_every_command_works_on_such_a_run_from_another_directory(
    home, command, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(command.replace("RUN", str(home / "runs/own_pictures")).split()) == 0
    assert expected in capsys.readouterr().out


def test_a_trained_network_holds_what_reading_a_picture_takes(home):
    found = json.loads((home / "runs/own_pictures/plain/network.json").read_text())
    assert found["classes"] == ["above", "below"]
    assert (found["input_shape"], found["centre"]) == ([12, 12, 3], 224 / 256)
    assert len(found["mean"]) == len(found["std"]) == 3
    assert found["about"]["data"] == f"folder/{home}/pictures"


def test_pictures_are_predicted_by_the_networks_of_a_run(home, capsys):
    run, files = str(home / "runs/own_pictures_W4A4"), [str(home / f"pictures/above/{i:02}.png") for i in (0, 2, 4)]
    assert main(["predict", run, *files]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "class", "probability", "twin"]
    assert [line.split()[0] for line in lines] == files
    assert main(["predict", run, *files, "--variant", "plain", "--certify", "--bits", "W4A8", "--format", "csv"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "file,class,probability,twin,certified"
    assert all(line.split(",")[-1] in ("true", "false") for line in lines)
    assert main(["predict", run, *files, "absent.png"]) == 1
    assert "error: absent.png cannot be read: No such file" in capsys.readouterr().err
    for arguments, message in (
        ([run, *files, "--variant", "plane"], "has no variant 'plane': did you mean 'plain'? choose from ["),
        ([str(home), *files], "is no folder of a run: it has no config.json"),
        ([str(home / "runs/own_pictures"), *files, "--bits", "4"], "has no quantizers of weights: quantize it first"),
        ([run], "the following arguments are required: FILE"),
    ):
        try:
            status = main(["predict", *arguments])
        except SystemExit as end:
            status = end.code
        assert status == 2
        assert message in capsys.readouterr().err


def test_a_folder_whose_pictures_changed_is_noticed(home, tmp_path, capsys):
    run, file = str(home / "runs/own_pictures_W4A4"), home / "pictures/above/00.png"
    content = file.read_bytes()
    file.write_bytes((home / "pictures/above/02.png").read_bytes())
    try:
        assert main(["certify", run, "--bits", "8"]) == 2
        assert "was trained on other data: those found as" in capsys.readouterr().err
    finally:
        file.write_bytes(content)


def test_crops_of_road_scenes_go_from_run_to_predict(data_dir, tmp_path, monkeypatch, capsys):
    runpy.run_path(ROOT / "docs/camvid_crops.py")["cut"](data_dir / "camvid", tmp_path / "crops", most=60)
    monkeypatch.setitem(registry.ARCHITECTURES, "resnet20", TINY)
    monkeypatch.chdir(tmp_path)
    options = ["--only", "symmetric", "--epochs", "15", "--batch-size", "32", "--data.name", "folder/crops"]
    assert main(["run", str(ROOT / "configs/own_pictures.py"), *options]) == 0
    result = json.loads(Path("runs/own_pictures/summary.json").read_text())["variants"]["symmetric"]
    capsys.readouterr()
    assert main(["predict", "runs/own_pictures", "crops/test", "--format", "jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = np.mean([Path(line["file"]).parent.name == line["class"] for line in lines])
    alike = np.mean([line["class"] == line["twin"] for line in lines])
    assert len(lines) == result["samples"]
    assert right > 0.35  # six classes
    np.testing.assert_allclose((right, alike), (result["accuracy"], result["agreement"]), atol=0.01)
