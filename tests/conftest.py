"""Test-wide settings: strict JAX, four simulated devices, checked shapes, and where the real data lies."""

import os
from pathlib import Path

# Most of the tests' time goes into making fast machine code for programs that run once: leave it unoptimized.
# XLA's own passes over the program, and so its arithmetic, stay as they are. Set before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated function of qpde checks its arguments' shapes and dtypes while the tests run, and only then.
install_import_hook("qpde", "beartype.beartype")

settings.register_profile("qpde", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("qpde")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Root of the real data. Skips where none was promised; a promised but missing folder is a failure."""
    root = os.environ.get("QPDE_DATA_DIR")
    if root is None:
        pytest.skip("QPDE_DATA_DIR is not set: no real data on this machine")
    path = Path(root)
    assert path.is_dir(), f"QPDE_DATA_DIR={root} is not a folder"
    return path


@pytest.fixture(scope="session")
def golden_dir(data_dir) -> Path:
    """Results of the published networks, beside the real data."""
    path = data_dir.parent / "golden"
    assert path.is_dir(), f"{path} is not a folder"
    return path
