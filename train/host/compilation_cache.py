"""Compiled programs are kept from one start of the program to the next: compiling is most of a short run.

JAX does it, once it is told where.  Its own variables go before what is chosen here: JAX_COMPILATION_CACHE_DIR moves
the folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off.  The folder may be deleted at any time.  Like
`train.host.allocator` this is for a program, never for a library.
"""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path


def keep_compiled_programs() -> Path | None:
    """Tell JAX to keep them in the user's cache folder.

    Returns:
      The folder; None where nothing was changed: JAX was told a folder or not to, or this one cannot be written.
    """
    import jax  # not before the allocator is set up, and this module is imported before

    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] is not None or not settings["jax_enable_compilation_cache"]:
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qpde" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or not to be written
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def compile_quickly() -> None:
    """Tell XLA not to optimize machine code, for a command that compiles much and runs each program a few times.

    On processors alone: an accelerator's programs would be slow. Flags that the environment holds go before. To be
    called before JAX is imported.
    """
    if "XLA_FLAGS" in os.environ or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # other versions may not know the flags, and refuse to start with them
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
