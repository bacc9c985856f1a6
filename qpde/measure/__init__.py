"""What a quantized network does beside its high-precision self: accuracy, agreement, errors, distributions, spectra."""

from qpde.measure.bit_widths import BitsComparison, Elastic, compare_bits
from qpde.measure.distributions import Distribution, distribution, distributions
from qpde.measure.faithfulness import Faithfulness, compare, evaluate, logit_difference, reestimate_statistics
from qpde.measure.histograms import Histogram, clip_from, histogram, merge
from qpde.measure.jacobians import JacobianSpectrum, jacobian_spectrum
from qpde.measure.pixels import confusion_matrix, intersection_over_union, mean_iou

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
    "confusion_matrix",
    "distribution",
    "distributions",
    "evaluate",
    "histogram",
    "intersection_over_union",
    "jacobian_spectrum",
    "logit_difference",
    "mean_iou",
    "merge",
    "reestimate_statistics",
]
