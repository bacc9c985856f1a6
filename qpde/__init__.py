"""qpde: networks that survive quantization, built as partial differential equations, in JAX.

Rooms: `quantizers`, `stencils`, `operators`, `integrators`, `graphs` and `norms` hold one idea each, as pure functions;
`models` assembles them; `nn` brings quantizers into users' own modules; `ptq` quantizes trained ones; `measure`
compares, `certify` proves, `plots` shows; `datasets` reads real data; `testing` checks what users write.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from qpde.nn import Rule, optimizer_labels, project
    from qpde.nn.quantized import quantized
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

_HOMES = {
    "Bits": "qpde.bits",
    "QuantizedNetwork": "qpde.models.protocol",
    "Rule": "qpde.nn",
    "TrainedNetwork": "qpde.trained",
    "load": "qpde.trained",
    "optimizer_labels": "qpde.nn",
    "project": "qpde.nn",
    "quantized": "qpde.nn",
    "save": "qpde.trained",
}
"""Modules of the names that are no rooms."""


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: the help of the script and the processes that read pictures need no JAX.
    if name in _HOMES:
        globals()[name] = value = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    module = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
