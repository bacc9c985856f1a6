"""Where a result comes from: command, commit, versions, device and date."""

import datetime
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).parents[2]


def provenance() -> dict[str, Any]:
    """What is written beside a result, values of JSON; the commit only where the code is a checkout."""
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in ("jax", "flax", "numpy")},
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
