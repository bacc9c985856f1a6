"""Training or evaluation, by the name that a module has for it."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

__all__ = ["training_arguments"]

NAMES = {  # how modules call what we call `train`, and whether it means the same or its opposite
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def training_arguments(layer: Any, train: bool, *, given: Collection[str] = ()) -> dict[str, bool]:
    """Arguments that tell a layer whether it is trained.

    Args:
      layer: A module. A function has no such arguments.
      train: Whether it is.
      given: Names that the call gives already.
    Returns:
      One for each name in `NAMES` that the layer's call has and that is no attribute of it with a value.
    """
    known = inspect.signature(type(layer).__call__).parameters if hasattr(layer, "apply") else ()
    return {
        name: train == same
        for name, same in NAMES.items()
        if name in known and name not in given and getattr(layer, name, None) is None
    }
