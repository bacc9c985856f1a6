"""What a quantized network does beside its high-precision self: accuracy, agreement, errors, distributions, spectra."""

from qpde.measure.bit_widths import BitsComparison, Elastic, compare_bits
from qpde.measure.distributions import Distribution, distribution, distributions
from qpde.measure.faithfulness import Faithfulness, compare, evaluate, logit_difference, reestimate_statistics
from qpde.measure.histograms import Histogram, clip_from, histogram, merge
from qpde.measure.jacobians import JacobianSpectrum, jacobian_spectrum

__all__ = [
    "BitsComparison",
    "Distribution",
    "Elastic",
    "Faithfulness",
    "Histogram",
    "JacobianSpectrum",
    "clip_from",
    "compare",
    "compare_bits",
    "distribution",
    "distributions",
    "evaluate",
    "histogram",
    "jacobian_spectrum",
    "logit_difference",
    "merge",
    "reestimate_statistics",
]
