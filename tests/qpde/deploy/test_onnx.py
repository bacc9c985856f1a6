"""The ONNX file gives the codes of the NumPy integers, in every runtime."""

import builtins
from functools import cache

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from folded_networks import flips, network, run_c

from qpde import deploy


def run_onnxruntime(model, images, *, optimized=True):
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


@cache
def openvino_core():
    """One for all tests: of several, one may leave the main thread a stack for signals that is gone."""
    return openvino.Core()


def run_openvino(model, images, folder):
    path, core = folder / "network.onnx", openvino_core()
    path.write_bytes(model.SerializeToString())
    compiled = core.compile_model(core.read_model(path), "CPU", deploy.OPENVINO_OPTIONS)
    results = compiled({"images": images})
    known = {output.name for output in model.graph.output}
    return {next(iter(known & key.get_names())): value for key, value in results.items()}


def compare(found, codes, logits):
    logits_found = found.pop("logits")
    assert flips(codes, {name: np.moveaxis(value, 1, 3) for name, value in found.items()}) == 0
    np.testing.assert_allclose(logits_found, logits, atol=3e-6)


@pytest.mark.parametrize(
    ("kind", "outer_bits", "settle", "kernel_bits"),
    [
        ("symmetric", None, False, 8),
        ("symmetric", 8, True, 4),
        ("plain", 8, True, 8),
        ("tied", None, False, 8),
        ("precise", None, False, 4),
        ("huber", None, False, 8),
        ("isotropic", None, False, 8),
        ("apot", None, False, 8),
        ("stable", 8, True, 8),
        ("inverted", 8, True, 8),
        ("inverted symmetric", None, False, 4),
        ("W2A2", 8, True, 4),
    ],
)
def test_every_runtime_gives_the_codes_of_the_reference(tmp_path, kind, outer_bits, settle, kernel_bits):
    model, variables, images = network(kind)
    folded = deploy.fold(model, variables, outer_bits=outer_bits)
    folded = deploy.settle(folded) if settle else folded
    logits, codes = deploy.run_reference(folded, images)
    proto = deploy.onnx_model(folded, kernel_bits=kernel_bits, codes=True)
    compare(run_onnxruntime(proto, images), codes, logits)
    compare(run_onnxruntime(proto, images, optimized=False), codes, logits)
    compare(run_openvino(proto, images, tmp_path), codes, logits)


def test_the_batch_and_the_image_size_are_symbolic():
    model, variables, images = network()
    folded = deploy.fold(model, variables)
    proto = deploy.onnx_model(folded)
    for x in (images[:1], np.tile(images, (2, 2, 1, 1))):
        np.testing.assert_allclose(run_onnxruntime(proto, x)["logits"], deploy.run_reference(folded, x)[0], atol=3e-6)


def test_the_graph_is_opset_21_without_transposed_convolutions_and_the_same_each_time():
    folded = deploy.fold(*network()[:2])
    proto = deploy.onnx_model(folded, image_size=(8, 8))
    assert proto.opset_import[0].version == 21
    assert "ConvTranspose" not in {node.op_type for node in proto.graph.node}
    assert proto.SerializeToString() == deploy.onnx_model(folded, image_size=(8, 8)).SerializeToString()
    kinds = {i.name: i.data_type for i in deploy.onnx_model(folded, kernel_bits=4).graph.initializer}
    assert kinds["block1.kernel1"] == kinds["block1.kernel1.adjoint"] == onnx.TensorProto.INT4


def test_the_fast_form_is_another_network_and_near():
    model, variables, images = network("plain")
    folded = deploy.fold(model, variables)
    logits, codes = deploy.run_reference(folded, images)
    proto = deploy.onnx_model(folded, fast=True, codes=True)
    found = run_onnxruntime(proto, images)
    assert "branch rounded" in {p.value for p in proto.metadata_props}
    total = sum(code.size for code in codes.values())
    changed = flips(codes, {name: np.moveaxis(found[name], 1, 3) for name in codes})
    assert 0 < changed < 0.3 * total
    assert max(np.abs(np.moveaxis(found[n], 1, 3).astype(int) - c).max() for n, c in codes.items()) <= 4
    assert np.abs(found["logits"] - logits).max() < 0.5 * np.abs(logits).max()


def test_what_has_no_graph_is_refused_with_what_has():
    folded = deploy.fold(*network()[:2])
    with pytest.raises(ValueError, match="kernel_bits=2 must be 8 or 4"):
        deploy.onnx_model(folded, kernel_bits=2)
    with pytest.raises(ValueError, match="pass the network before settle"):
        deploy.onnx_model(deploy.settle(folded), fast=True)


def test_a_missing_package_is_named(monkeypatch):
    found = builtins.__import__

    def without_onnx(name):
        raise ImportError(name)

    monkeypatch.setattr("qpde.deploy.onnx.importlib.import_module", without_onnx)
    with pytest.raises(ImportError, match="onnx, which is missing: pip install onnx"):
        deploy.onnx_model(deploy.fold(*network()[:2]))
    assert builtins.__import__ is found


@pytest.mark.parametrize("symmetric", [True, False])
def test_resnet20_has_one_answer_in_every_runtime(tmp_path, symmetric):
    model, variables, images = network(size=32, whole=True, symmetric=symmetric)
    folded = deploy.settle(deploy.fold(model, variables, outer_bits=8))
    assert all(margin.is_safe for margin in deploy.margins(folded))
    logits, codes = deploy.run_reference(folded, images)
    found, found_codes = deploy.run(folded, return_codes=True)(images)
    assert flips(codes, found_codes) == 0
    np.testing.assert_allclose(found, logits, atol=3e-6)
    proto = deploy.onnx_model(folded, codes=True)
    compare(run_onnxruntime(proto, images), codes, logits)
    compare(run_openvino(proto, images, tmp_path), codes, logits)
    logits_c, codes_c = run_c(folded, images, tmp_path, "-O2")
    assert flips({name: code.reshape(-1) for name, code in codes.items()}, codes_c) == 0
    np.testing.assert_allclose(logits_c, logits, atol=3e-6)
