"""Deployment: one integer program of a trained network, and the writers that turn it into files."""

from qpde.deploy.c import c_source, save_c
from qpde.deploy.export import FORMATS, export
from qpde.deploy.files import load_packed, save_packed, theoretical_bytes
from qpde.deploy.folded import Folded, Note, State
from qpde.deploy.folding import fold
from qpde.deploy.graphs import FoldedGraph, fold_graph
from qpde.deploy.integer import run, run_reference
from qpde.deploy.modules import PackedKernel, PackedModule, export_module, load_module, pack_module, save_module
from qpde.deploy.onnx import OPENVINO_OPTIONS, onnx_model, require, save_onnx
from qpde.deploy.program import accumulator_bound, whole_bounds
from qpde.deploy.settle import Margin, margins, settle
from qpde.deploy.stablehlo import export_graph, export_images, save_stablehlo

__all__ = [
    "FORMATS",
    "OPENVINO_OPTIONS",
    "Folded",
    "FoldedGraph",
    "Margin",
    "Note",
    "PackedKernel",
    "PackedModule",
    "State",
    "accumulator_bound",
    "c_source",
    "export",
    "export_graph",
    "export_images",
    "export_module",
    "fold",
    "fold_graph",
    "load_module",
    "load_packed",
    "margins",
    "onnx_model",
    "pack_module",
    "require",
    "run",
    "run_reference",
    "save_c",
    "save_module",
    "save_onnx",
    "save_packed",
    "save_stablehlo",
    "settle",
    "theoretical_bytes",
    "whole_bounds",
]
