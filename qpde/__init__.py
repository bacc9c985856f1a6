"""qpde: networks that survive quantization, built as partial differential equations, in JAX.

Rooms: `quantizers`, `stencils`, `operators`, `integrators`, `graphs` and `norms` hold one idea each, as pure functions;
`models` assembles them; `nn` brings quantizers into users' own modules; `ptq` quantizes trained ones; `measure`
compares, `certify` proves, `plots` shows; `datasets` reads real data; `testing` checks what users write.
"""

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
from qpde.ptq import calibrate
from qpde.trained import TrainedNetwork, load, save

__all__ = [
    "Bits",
    "QuantizedNetwork",
    "Rule",
    "TrainedNetwork",
    "calibrate",
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
