"""Pictures of what was measured. Needs matplotlib, of the extra `train`; its global state stays as it is."""

from qpde.plots.curves import against_bits_figure, along_depth_figure, layer_error_figure, over_smoothing_figure
from qpde.plots.frame import COLOURS
from qpde.plots.spreads import bound_figure, histogram_figure, maps_figure, spectrum_figure

__all__ = [
    "COLOURS",
    "against_bits_figure",
    "along_depth_figure",
    "bound_figure",
    "histogram_figure",
    "layer_error_figure",
    "maps_figure",
    "over_smoothing_figure",
    "spectrum_figure",
]
