"""Which device a run computes on, and whether there is a better one that JAX cannot use."""

import shutil
from pathlib import Path

import jax

__all__ = ["device_line"]

# Traces of an accelerator, and the extra of this package with which JAX can use it.
_ACCELERATORS = {
    "an NVIDIA GPU": ("cuda", lambda: Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None),
    "a TPU": ("tpu", lambda: Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()),
}


def device_line() -> str:
    """The devices in words, such as "on 1 cpu device (cpu)". On a CPU beside an accelerator it says so."""
    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    line = f"on {len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''} ({kinds})"
    if devices[0].platform != "cpu":
        return line
    for name, (extra, is_there) in _ACCELERATORS.items():
        if is_there():
            return (
                f"{line}; {name} is there, but JAX cannot use it: install with the extra [{extra}], or see its driver"
            )
    return line
