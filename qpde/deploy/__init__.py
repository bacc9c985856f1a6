"""Deployment: one integer program of a trained network, and the writers that turn it into files."""

from qpde.deploy.folded import Folded, Note, fold
from qpde.deploy.integer import run, run_reference
from qpde.deploy.program import accumulator_bound, whole_bounds

__all__ = ["Folded", "Note", "accumulator_bound", "fold", "run", "run_reference", "whole_bounds"]
