"""qpde: networks that survive quantization, built as partial differential equations, in JAX.

Rooms: `quantizers`, `stencils`, `operators`, `integrators`, `graphs` hold one idea each, as pure functions; `models`
assembles them; `calibration` and `equalization` quantize trained ones; `stability`, `certificate`, `diagnostics`,
`distributions`, `elastic`, `budget` and `plots` measure and show; `datasets` reads real data.
"""

from qpde import (
    budget,
    calibration,
    certificate,
    datasets,
    diagnostics,
    distributions,
    elastic,
    equalization,
    graphs,
    integrators,
    models,
    operators,
    quantizers,
    stability,
    stencils,
)
from qpde.bits import Bits

__all__ = [
    "Bits",
    "budget",
    "calibration",
    "certificate",
    "datasets",
    "diagnostics",
    "distributions",
    "elastic",
    "equalization",
    "graphs",
    "integrators",
    "models",
    "operators",
    "quantizers",
    "stability",
    "stencils",
]
