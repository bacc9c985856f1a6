"""qpde: networks that survive quantization, built as partial differential equations, in JAX.

Rooms: `quantizers`, `stencils`, `operators`, `integrators`, `graphs` and `norms` hold one idea each, as pure functions;
`models` assembles them; `ptq` quantizes trained ones; `measure` compares, `certify` proves, `plots` shows; `datasets`
reads real data.
"""

from qpde import (
    certify,
    datasets,
    graphs,
    integrators,
    measure,
    models,
    norms,
    operators,
    ptq,
    quantizers,
    stencils,
)
from qpde.bits import Bits

__all__ = [
    "Bits",
    "certify",
    "datasets",
    "graphs",
    "integrators",
    "measure",
    "models",
    "norms",
    "operators",
    "ptq",
    "quantizers",
    "stencils",
]
