"""Deployment: one integer program of a trained network, and the writers that turn it into files."""

from qpde.deploy.files import load_packed, save_packed
from qpde.deploy.folded import Folded, Note, fold
from qpde.deploy.graphs import FoldedGraph, fold_graph
from qpde.deploy.integer import run, run_reference
from qpde.deploy.program import accumulator_bound, whole_bounds
from qpde.deploy.settle import Margin, margins, settle

__all__ = [
    "Folded",
    "FoldedGraph",
    "Margin",
    "Note",
    "accumulator_bound",
    "fold",
    "fold_graph",
    "load_packed",
    "margins",
    "run",
    "run_reference",
    "save_packed",
    "settle",
    "whole_bounds",
]
