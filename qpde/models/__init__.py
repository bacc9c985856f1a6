"""Networks, assembled from the steps and operators of qpde.

`create` makes a network by name, `from_torch_state` one with published weights, `summary` its costs, and
`calibrate_clips` reads its clips off data. `blocks` holds the formulas, `network` the Flax modules around them.
"""

from qpde.models.blocks import Smoothing
from qpde.models.calibrate import calibrate_clips
from qpde.models.network import Network
from qpde.models.published import from_torch_state
from qpde.models.registry import create, names
from qpde.models.summary import Summary, summary

__all__ = ["Network", "Smoothing", "Summary", "calibrate_clips", "create", "from_torch_state", "names", "summary"]
