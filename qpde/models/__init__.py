"""Networks, assembled from the steps and operators of qpde.

`create` makes a network by name, `from_torch_state` one with published weights, `summary` its costs, and
`calibrate_clips` reads its clips off data. `blocks` holds the formulas, `network` the Flax modules around them;
`graph_layers` and `graph_networks` are the same for graphs.
"""

from qpde.models.clips import calibrate_clips, converge_norms
from qpde.models.graphs.layers import GraphSmoothing
from qpde.models.graphs.networks import GraphNetwork, gat, gcn, gcnii, pde_gcn
from qpde.models.images.architecture import Architecture
from qpde.models.images.cost import Summary, summary
from qpde.models.images.network import Network
from qpde.models.images.torch_weights import from_torch_state
from qpde.models.options import NetworkOptions, Smoothing
from qpde.models.protocol import QuantizedNetwork
from qpde.models.registry import ARCHITECTURES, create, image_network, names

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GraphNetwork",
    "GraphSmoothing",
    "Network",
    "NetworkOptions",
    "QuantizedNetwork",
    "Smoothing",
    "Summary",
    "calibrate_clips",
    "converge_norms",
    "create",
    "from_torch_state",
    "gat",
    "gcn",
    "gcnii",
    "image_network",
    "names",
    "pde_gcn",
    "summary",
]
