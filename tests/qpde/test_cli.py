"""The script `qpde` on networks in folders: predictions of pictures in every form, and what stands in the way."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import qpde
from qpde.certify import certify
from qpde.cli import COMMANDS, WIDTH, main
from qpde.datasets import load_folder
from qpde.models import Architecture, calibrate_clips, converge_norms, image_network
from qpde.models.images.blocks import BasicBlock
from qpde.predictions import Predictor, predict_files

ROOT = Path(__file__).parents[2]
TINY = Architecture("tiny", BasicBlock, ((4, 4, 2, 1, 1),))
CLASSES = ("car", "road", "tree")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of each class, of different sizes, and the squares that evaluation sees of them."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / CLASSES[i % 3] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        height, width = rng.integers(12, 30, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """A network with random weights, saved as training would."""
    images = load_folder(pictures, size=8, centre=0.8)
    model = image_network(TINY, num_classes=3, weight_bits=4, act_bits=4)
    x = images.normalize(images.train.images)
    variables = calibrate_clips(model, jax.jit(model.init)(jax.random.key(1), x), x, train=True)
    details = {"classes": CLASSES, "input_shape": (8, 8, 3), "mean": images.mean, "std": images.std, "centre": 0.8}
    about = {"data": "folder/pictures", "seed": 3, "versions": {"jax": "0.10"}}
    return qpde.save(tmp_path_factory.mktemp("net"), model, variables, **details, about=about)


@pytest.fixture(scope="module")
def squares(pictures):
    """What evaluation sees, in the order of the files, and the files."""
    images = load_folder(pictures, size=8, centre=0.8)
    files = sorted(pictures.rglob("*.png"))
    split = dict.fromkeys(files)
    found = qpde.datasets.folders.find_pictures(pictures)
    for part in ("train", "validation", "test"):
        for number, pixels in zip(getattr(found, part), getattr(images, part).images, strict=True):
            split[pictures / found.paths[number]] = pixels
    return files, np.stack(list(split.values()))


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_predictions_are_those_of_the_network_on_what_evaluation_sees(folder, pictures, squares, capsys):
    files, images = squares
    network = qpde.load(folder)
    status, out, err = run(capsys, "predict", folder, pictures, "--format", "jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [line["file"] for line in lines] == [str(path) for path in files]
    logits, twin = network.logits(images), network.logits(images, bits=qpde.Bits(4, 32))
    assert [line["class"] for line in lines] == [CLASSES[k] for k in logits.argmax(-1)]
    assert [line["twin"] for line in lines] == [CLASSES[k] for k in twin.argmax(-1)]
    expected = jax.nn.softmax(logits).max(-1)
    np.testing.assert_allclose([line["probability"] for line in lines], expected, atol=2e-6)
    assert list(lines[0]) == ["file", "class", "probability", "twin"]

    status, out, _ = run(capsys, "predict", folder, pictures, "--format", "jsonl", "--bits", "W2A8")
    wide = network.logits(images, bits=qpde.Bits(2, 8))
    found = [json.loads(line)["probability"] for line in out.splitlines()]
    np.testing.assert_allclose(found, jax.nn.softmax(wide).max(-1), atol=2e-6)
    assert not np.allclose(found, expected)


def test_a_certified_prediction_is_what_the_certificate_says(folder, pictures, squares, capsys):
    _, images = squares
    network = qpde.load(folder)
    status, out, _ = run(capsys, "predict", folder, pictures, "--certify", "--bits", "W4A8", "--format", "jsonl")
    lines = [json.loads(line) for line in out.splitlines()]
    bits = qpde.Bits(jnp.int32(4), jnp.int32(8))
    x = network.normalize(images)
    variables = converge_norms(network.model, network.variables, x, bits=bits)
    expected = certify(network.model, variables, x, bits)
    assert status == 0
    assert [line["certified"] for line in lines] == expected.certified.tolist()
    assert any(expected.certified)
    assert [line["class"] for line in lines] == [CLASSES[k] for k in expected.prediction]
    assert all(line["class"] == line["twin"] for line in lines if line["certified"])


def test_forms_say_the_same(folder, pictures, capsys):
    file = pictures / "car/00.png"
    found = {form: run(capsys, "predict", folder, file, "--format", form)[1] for form in ("table", "csv", "jsonl")}
    line = json.loads(found["jsonl"])
    (row,) = csv.DictReader(io.StringIO(found["csv"]))
    assert row == {name: str(value) for name, value in line.items()}
    header, cells = (text.split() for text in found["table"].splitlines())
    assert header == ["file", "class", "probability", "twin"]
    assert cells == [str(file), line["class"], f"{line['probability']:.2%}", line["twin"]]


def test_several_networks_stand_beside_one_another(folder, pictures, capsys):
    network = qpde.load(folder)
    predictors = {"low": Predictor(network, qpde.Bits(2, 2)), "own": Predictor(network)}
    found = {}
    for form in ("table", "csv", "jsonl"):
        out = io.StringIO()
        assert predict_files(predictors, [pictures], form=form, out=out) == 0
        found[form] = out.getvalue()
    lines = [json.loads(line) for line in found["jsonl"].splitlines()]
    rows = list(csv.DictReader(io.StringIO(found["csv"])))
    assert [row["low.class"] for row in rows] == [line["low"]["class"] for line in lines]
    assert [float(row["own.probability"]) for row in rows] == [line["own"]["probability"] for line in lines]
    header, *table = found["table"].splitlines()
    assert header.split() == ["file", "low", "own"]
    for text, line in zip(table, lines, strict=True):
        for own in (line["low"], line["own"]):
            assert f"{own['class']} {own['probability']:.1%}" in text
            assert own["class"] == own["twin"] or f"(twin: {own['twin']})" in text


def test_files_that_cannot_be_read_are_named_and_the_others_predicted(folder, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"none")
    (tmp_path / "empty").mkdir()
    files = [tmp_path / "absent.png", pictures / "car/00.png", tmp_path / "broken.png", tmp_path / "empty"]
    status, out, err = run(capsys, "predict", folder, *files, "--format", "csv")
    assert status == 1
    assert [line.split(",")[0] for line in out.splitlines()] == ["file", str(files[1])]
    assert sorted(err.splitlines()) == sorted(
        [
            f"error: {files[0]} cannot be read: No such file or directory",
            f"error: {files[2]} cannot be read: it is no picture that this Pillow reads",
            f"error: {files[3]} has no pictures below it",
        ]
    )
    status, out, _ = run(capsys, "predict", folder, tmp_path / "absent.png")
    assert status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent", "a.png"], "absent holds no trained network: it has no network.json"),
        (["predict", "NET", "a.png", "--bits", "W1A4"], "bits 'W1A4' must lie in 2 to 32"),
        (["predict", "NET", "a.png", "--bits", "four"], "bits 'four' are neither like W4A8 nor a number of bits"),
        (
            ["predict", "NET", "a.png", "--bits", "32", "--certify"],
            "nothing is rounded, so there is nothing to certify",
        ),
        (["predict", "NET", "a.png", "--newton-steps", "-1"], "newton steps (=-1) must be at least 0"),
        (["predict", "NET"], "the following arguments are required: FILE: `qpde predict --help` lists the options"),
        (["predict", "NET", "a.png", "--format", "tabel"], "invalid choice 'tabel': did you mean 'table'? choose from"),
        (["predict", "NET", "a.png", "--bit", "4"], "unrecognized arguments: --bit 4: did you mean '--bits'?"),
        (["export", "NET", "--out", "e", "--format", "onxx"], "invalid choice 'onxx': did you mean 'onnx'?"),
        (
            ["predcit", "NET"],
            "there is no command 'predcit': did you mean 'predict'? choose from ['predict',",
        ),
        (["show", "absent"], "absent holds no trained network"),
    ],
)
def test_bad_input_is_one_line_with_status_2(folder, capsys, arguments, message):
    status, out, err = run(capsys, *[str(folder) if word == "NET" else word for word in arguments])
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_networks_that_take_no_pictures_or_round_nothing_are_refused_with_the_reason(tmp_path, folder):
    graph = qpde.models.pde_gcn(num_classes=2, layers=1, width=4)
    with pytest.raises(ValueError, match="takes a graph, and pictures are none"):
        Predictor(qpde.TrainedNetwork(graph, {}, ("a", "b")))
    network = qpde.load(folder)
    with pytest.raises(ValueError, match="takes inputs of shape None, which pictures cannot be made into"):
        Predictor(qpde.TrainedNetwork(network.model, network.variables, CLASSES))
    exact = network.model.with_options(weight_bits=None, act_bits=None)
    full = qpde.TrainedNetwork(exact, network.variables, CLASSES, (8, 8, 3))
    with pytest.raises(ValueError, match=r"no quantizers of weights: quantize it first, see qpde\.ptq\.quantize"):
        Predictor(full, qpde.Bits(4, 4))
    with pytest.raises(ValueError, match="nothing is rounded"):
        Predictor(full, certified=True)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    for bits in (None, qpde.Bits(32, 32)):
        assert [found.twin for found in Predictor(full, bits)(images)] == [None] * 3


def test_show_says_what_a_network_is(folder, capsys):
    status, out, _ = run(capsys, "show", folder)
    assert status == 0
    for words in ("tiny, 2 blocks", "weights: 4 bits, activations: 4 bits", "car, road, tree", "8x8x3", "seed: 3"):
        assert words in out
    assert "the middle, 0.8 of the short side" in out
    status, out, _ = run(capsys, "show", folder, "--json")
    found = json.loads(out)
    assert found["classes"] == list(CLASSES)
    assert found["about"]["versions"] == {"jax": "0.10"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_plain_terminal(command, capsys):
    status, out, err = run(capsys, *command.split(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: qpde")
    assert [line for line in out.splitlines() if len(line) > WIDTH] == []


def test_help_and_completion_import_no_jax():
    code = "import sys, qpde.cli; qpde.cli.main(['predict', '--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def test_pictures_need_pillow_and_say_so(folder, pictures):
    code = f"""
import sys
sys.modules["PIL"] = None
from qpde.cli import main
sys.exit(main(["predict", {str(folder)!r}, {str(pictures)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: pictures are read by pillow, which is missing: pip install pillow\n"


def test_a_reader_that_has_seen_enough_ends_the_output_silently(folder, pictures):
    command = f"{sys.executable} -m qpde.cli predict {folder} {pictures} {pictures} --format jsonl"
    script = f"set -o pipefail; {command} | head -c 10 >/dev/null; exec 3>&1; {command} | true; echo $?"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qpde ", {"predict", "export", "show"}),
        ("qpde predict --for", {"--format"}),
        ("qpde predict --format ", {"table", "csv", "jsonl"}),
    ],
)
def test_the_shell_is_told_what_can_follow(line, expected, tmp_path):
    found = tmp_path / "found"
    environment = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": "\n"}
    environment |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PATH": ""}
    subprocess.run([sys.executable, "-m", "qpde.cli"], cwd=ROOT, env=environment, check=True)
    assert expected <= {word.strip() for word in found.read_text().split("\n")}
