"""`export` writes the files of a finished run and measures them on its test images, in the real runtimes."""

import csv
import ctypes
import json
import sys
from pathlib import Path

import jax
import pytest

import qpde
from qpde import deploy
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import main
from train.trained.deployed import latencies
from train.trained.runtimes import openvino_runtime

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = """
from train.config import Data, Experiment, Model, Variant

recipes = {"fast": Experiment(
    name="tiny",
    variants=(Variant("plain", {"symmetric": False}),),
    data=Data("digits", size=8, crop_padding=1, flip=False),
    model=Model("tiny"),
    epochs=2,
    batch_size=256,
    clip_start="rms",
)}
"""
GRAPH = """
from train.config.graphs import GraphData, GraphExperiment, GraphModel, GraphVariant

recipes = {"fast": GraphExperiment(
    name="nodes",
    variants=(GraphVariant("symmetric-2"),),
    data=GraphData("digits"),
    model=GraphModel(layers=2, width=8),
    bits=((4, 8),),
    epochs=3,
    tune_epochs=1,
    seeds=1,
    report_every=3,
)}
"""
RUNTIMES = {"JAX, integers", "onnxruntime", "onnxruntime, not optimized", "OpenVINO", "C", "StableHLO"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a network of two blocks."""
    folder, monkeypatch = tmp_path_factory.mktemp("deployed"), pytest.MonkeyPatch()
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),)))
    monkeypatch.chdir(folder)
    (folder / "tiny.py").write_text(CONFIG)
    assert main(["run", "tiny.py"]) == 0
    monkeypatch.undo()
    return folder / "runs" / "tiny"


def test_every_runtime_is_measured_and_the_table_is_written(run, capsys):
    arguments = ["--images", "60", "--rounds", "1", "--settle", "--outer-bits", "8", "--newton-steps", "3"]
    assert main(["export", str(run), *arguments]) == 0
    printed = capsys.readouterr().out
    folder = run / "export" / "plain"
    assert {path.name for path in folder.iterdir()} == {
        *deploy.FORMATS.values(), "export.json", "deployment.json", "deployment.csv", "deployment.md"
    }  # fmt: skip
    found = json.loads((folder / "deployment.json").read_text())
    rows = {row["runtime"]: row for row in found["runtimes"]}
    assert rows.keys() - {"JAX, fake-quantized"} == RUNTIMES | {
        f"{n}, float32" for n in ("JAX", "onnxruntime", "OpenVINO")
    }
    assert found["missing"] == {}
    assert found["images"] == 60
    codes = 60 * (8 * 8 + 4 * 8 * 8 * 8)  # the images' own, and two blocks of two quantizers with 8 channels
    for name in RUNTIMES:
        row = rows[name]
        assert (row["differing"], row["codes"]) == (0, codes)  # settled: nobody can flip a code
        assert row["logits_off"] < 1e-4
        assert row["certified"] <= row["agreement"]
        assert row["accuracy"] == rows["C"]["accuracy"]
        assert set(row["against_float32"]) == {"1", "32"}
    assert rows["C"]["certified"] > 0
    # The network itself has a stem in float32, so that its codes differ.
    assert 0 < rows["JAX, fake-quantized"]["differing"] < 0.2 * codes
    with open(folder / "deployment.csv", newline="") as file:
        table = {row["runtime"]: row for row in csv.DictReader(file)}
    assert table["OpenVINO"]["codes"] == str(codes)
    assert float(table["OpenVINO, float32"]["milliseconds_32"]) > 0
    text = (folder / "deployment.md").read_text()
    for row in rows:
        assert f"| {row} |" in text
        assert row in printed
    assert f"network.safetensors: {found['bytes']['network.safetensors']:,} bytes" in text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenVINO leaves the stack alone")
def test_signals_are_handled_on_memory_that_is_there_when_openvino_has_gone(run, tmp_path):
    """A handler in Python would crash without a word on the stack of an OpenVINO that is no more."""

    class Stack(ctypes.Structure):
        _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    network = qpde.load(run / "plain")
    folded = deploy.fold(network.model, network.variables)
    programs = [openvino_runtime(folded, tmp_path) for _ in range(2)]
    while programs:
        programs.pop(0)
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    mapped = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert any(int(first, 16) <= stack.start < int(end, 16) for first, end in mapped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "images (=0) must be at least 1"),
        (["--bits", "x"], "neither like W4A8"),
        (["--format", "tflite"], "unknown format 'tflite'"),
        (["--outer-bits", "5"], "outer_bits=5 must be 8"),
    ],
)
def test_bad_requests_end_in_a_line(run, arguments, message, capsys, tmp_path):
    assert main(["export", str(run), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_networks_on_graphs_are_exported_by_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nodes.py").write_text(GRAPH)
    with jax.numpy_dtype_promotion("standard"):
        assert main(["run", "nodes.py"]) == 0
        assert main(["export", "runs/nodes", "--format", "onnx"]) == 2
        assert "a graph network has no format 'onnx': use packed or stablehlo" in capsys.readouterr().err
        assert main(["export", "runs/nodes"]) == 0
    folder = tmp_path / "runs/nodes/export/symmetric-2/W4A8"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".stablehlo", ".json", ".csv", ".md"}
    found = json.loads((folder / "deployment.json").read_text())
    rows = {row["runtime"]: row for row in found["runtimes"]}
    assert rows.keys() == {"packed", "JAX, fake-quantized", "StableHLO"}
    for row in rows.values():
        assert row["logits_off"] < 1e-4
        assert row["accuracy"] == rows["packed"]["accuracy"]
    assert "test nodes" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_latencies_are_medians_of_calls_in_turns():
    calls = []
    found = latencies({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 5
    assert found.keys() == {"a", "b"}
