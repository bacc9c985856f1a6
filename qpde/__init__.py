"""qpde: networks that survive quantization, built as partial differential equations, in JAX.

Rooms: `quantizers`, `stencils`, `operators`, `integrators`, `graphs` and `norms` hold one idea each, as pure functions;
`models` assembles them; `nn` brings quantizers into users' own modules; `ptq` quantizes trained ones; `measure`
compares, `certify` proves, `plots` shows; `datasets` reads real data; `testing` checks what users write.
"""

from importlib.metadata import PackageNotFoundError, version

from qpde import (
    certify,
    datasets,
    graphs,
    integrators,
    measure,
    models,
    nn,
    norms,
    operators,
    ptq,
    quantizers,
    stencils,
    testing,
)
from qpde.bits import Bits
from qpde.models.protocol import QuantizedNetwork
from qpde.nn import Rule, optimizer_labels, project, quantized
from qpde.trained import TrainedNetwork, load, save

try:
    __version__ = version("qpde")  # of setup.cfg, by way of what was installed
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Bits",
    "QuantizedNetwork",
    "Rule",
    "TrainedNetwork",
    "__version__",
    "certify",
    "datasets",
    "graphs",
    "integrators",
    "load",
    "measure",
    "models",
    "nn",
    "norms",
    "operators",
    "optimizer_labels",
    "project",
    "ptq",
    "quantized",
    "quantizers",
    "save",
    "stencils",
    "testing",
]
