"""The first line of a run: its devices, and one that JAX cannot use."""

from train.host import device


def test_the_devices_are_named_and_an_accelerator_that_jax_cannot_use(monkeypatch):
    monkeypatch.setattr(device, "_ACCELERATORS", {})
    assert device.device_line() == "on 4 cpu devices (cpu)"
    monkeypatch.setattr(device, "_ACCELERATORS", {"an NVIDIA GPU": ("cuda", lambda: True)})
    assert device.device_line() == (
        "on 4 cpu devices (cpu); an NVIDIA GPU is there, but JAX cannot use it: install with the extra [cuda], or see "
        "its driver"
    )
