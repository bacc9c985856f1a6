"""The section that says where the networks of a page come from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpde.trained import DESCRIPTION
from train.page.html import facts

_FIELDS = ("seed", "data", "command", "commit", "device", "versions", "date")


def section(networks: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, Any]) -> str:
    """HTML: seed, command, commit, device, versions, date and duration; what all networks share stands once.

    Args:
      networks: By name, where it came from: `about` of a `qpde.TrainedNetwork`. It may lack or hold anything.
      seconds: By name, how long its training took, or None.
    """
    known = {name: about if isinstance(about, Mapping) else {} for name, about in networks.items()}
    rows = [(field, {name: _text(about.get(field)) for name, about in known.items()}) for field in _FIELDS]
    rows.append(("training time", {name: _duration(seconds.get(name)) for name in networks}))
    return facts([(field, _shared(values)) for field, values in rows])


def read_about(folder: Path) -> dict[str, Any]:
    """Where the network in a folder came from; nothing where it does not say."""
    try:
        about = json.loads((folder / DESCRIPTION).read_text())["about"]
    except (OSError, RecursionError, ValueError, KeyError, TypeError):
        return {}
    return about if isinstance(about, dict) else {}


def _shared(values: Mapping[str, str]) -> str:
    """One value where all are alike, else each with the names that have it."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return str(value)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
