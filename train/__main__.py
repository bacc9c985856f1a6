"""`python -m train`: the process is set up before JAX is used, then the command line takes over."""

from train.compiled import keep_compiled_programs
from train.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    keep_compiled_programs()
    from train.cli import main  # imports JAX, which allocates

    raise SystemExit(main())
