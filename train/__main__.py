"""`python -m train`: the process is set up before JAX is used, then the command line takes over."""

from train.host.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # before the imports that take seconds

    import contextlib
    import os
    import sys

    from train.host.allocator import keep_freed_memory
    from train.host.compilation_cache import compile_quickly, keep_compiled_programs

    if sys.argv[1:2] == ["report"]:
        compile_quickly()
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on its small matrices, threads only wait for each other
    keep_freed_memory()
    keep_compiled_programs()
    from train.commands.cli import main

    def without_abandoned_writes(found, shown=sys.unraisablehook):
        """Say nothing of writes that a failed checkpoint left behind: their threads find its event loop closed."""
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            shown(found)

    sys.unraisablehook = without_abandoned_writes
    status = main()
    if status == 1:
        # Where a checkpoint could not be written, threads of orbax wait for many minutes for a folder that will not be.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)
