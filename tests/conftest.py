"""Test-wide settings: strict JAX, four simulated devices, checked shapes, and where the real data lies."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Most of the tests' time goes into making fast machine code for programs that run once. So it stays unoptimized. It
# also stays in one module: parts for other threads cost a sixth more, and those threads are busy with other tests.
# XLA's own passes over the program, and so its arithmetic, stay as they are. Set before jax is imported.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # XLA refuses to start with a flag that it no longer knows
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # the present emitters take twice the time
os.environ.setdefault("XLA_FLAGS", FLAGS)

# matplotlib believes its list of fonts for ever: no test reads, or leaves behind, one that was cut short or made
# elsewhere. The processes that a test starts, and those that share the tests, use the same.
FONT_LIST = None
if "MPLCONFIGDIR" not in os.environ:
    FONT_LIST = os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="qpde_fonts_")

# The threads of NumPy wait for each other by computing: where tests share cores, that costs ten times the work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# OpenVINO reports its use from a forked process, which JAX warns of; where it sees a test system, it does not.
os.environ.setdefault("CI", "true")

# Tracing makes millions of objects that die without the collector: it looks for circles a hundred times less often.
gc.set_threshold(100_000, 20, 100)

import jax
import pytest
from durations import SLOW, function_of, listed
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # no test reads from which line an operation came

# Every annotated function of qpde checks its arguments' shapes and dtypes while the tests run, and only then.
install_import_hook("qpde", "beartype.beartype")

settings.register_profile("qpde", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("qpde")


def pytest_collection_modifyitems(items):
    """Marks the tests that `make test-fast` leaves out."""
    slow = listed(SLOW.read_text())
    for item in items:
        if function_of(item.nodeid) in slow:
            item.add_marker("slow")


def pytest_unconfigure():
    """Only the process that made the list of fonts removes it."""
    if FONT_LIST is not None:
        shutil.rmtree(FONT_LIST, ignore_errors=True)


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
def small_golden_dir() -> Path:
    """Results of the published quantizers and of the first stage of two published networks, small enough to be here."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir(data_dir) -> Path:
    """Results of the published networks as a whole, beside the real data."""
    path = data_dir.parent / "golden"
    assert path.is_dir(), f"{path} is not a folder"
    return path


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Drops compiled programs at the end of each file: a process has room for about 65,000 mappings of memory, each
    program takes some, and XLA crashes where there are none left.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs of the same network share their compiled programs: compiling is nearly all that these tests do."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
