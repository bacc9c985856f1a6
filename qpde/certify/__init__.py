"""Proofs: inputs whose prediction the rounding of activations cannot change, and the constants behind them."""

from qpde.certify.certificate import certify, exact_twin
from qpde.certify.proof import Certificate
from qpde.certify.step_bounds import StepBound, StepBounds, step_bounds, step_lipschitz

__all__ = [
    "Certificate",
    "StepBound",
    "StepBounds",
    "certify",
    "exact_twin",
    "step_bounds",
    "step_lipschitz",
]
