"""Proofs: inputs whose prediction the rounding of activations cannot change, and the constants behind them."""

from qpde.certify.certificate import Certificate, certify, exact_twin
from qpde.certify.kernel_norms import conv_norm_bound, conv_norm_is_at_most, depthwise_norm_bound
from qpde.certify.step_bounds import StepBound, step_bound, step_bounds, step_lipschitz

__all__ = [
    "Certificate",
    "StepBound",
    "certify",
    "conv_norm_bound",
    "conv_norm_is_at_most",
    "depthwise_norm_bound",
    "exact_twin",
    "step_bound",
    "step_bounds",
    "step_lipschitz",
]
