"""Pictures of what was measured. Needs matplotlib, of the extra `train`; its global state stays as it is."""

from qpde.plots.curves import (
    against_bits_figure,
    along_depth_figure,
    layer_error_figure,
    over_smoothing_figure,
    over_time_figure,
)
from qpde.plots.frame import COLOURS
from qpde.plots.points import NetworkPoint, frontier, frontier_figure
from qpde.plots.spreads import bound_figure, confusion_figure, histogram_figure, maps_figure, spectrum_figure
from qpde.plots.svg import inline_svg

__all__ = [
    "COLOURS",
    "NetworkPoint",
    "against_bits_figure",
    "along_depth_figure",
    "bound_figure",
    "confusion_figure",
    "frontier",
    "frontier_figure",
    "histogram_figure",
    "inline_svg",
    "layer_error_figure",
    "maps_figure",
    "over_smoothing_figure",
    "over_time_figure",
    "spectrum_figure",
]
