"""`python -m train`: the process is set up before JAX is used, then the command line takes over."""

from train.host.allocator import keep_freed_memory
from train.host.compilation_cache import keep_compiled_programs

if __name__ == "__main__":
    keep_freed_memory()
    keep_compiled_programs()
    from train.commands.cli import main

    raise SystemExit(main())
