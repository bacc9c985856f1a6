"""qpde: networks that survive quantization, built as partial differential equations, in JAX.

Rooms: `quantizers`, `stencils`, `operators`, `integrators`, `graphs` hold one idea each, as pure functions; `models`
assembles them; `stability`, `diagnostics`, `plots` measure and show; `datasets` reads real data.
"""

from qpde import datasets, diagnostics, graphs, integrators, models, operators, quantizers, stability, stencils
from qpde.bits import Bits

__all__ = [
    "Bits",
    "datasets",
    "diagnostics",
    "graphs",
    "integrators",
    "models",
    "operators",
    "quantizers",
    "stability",
    "stencils",
]
