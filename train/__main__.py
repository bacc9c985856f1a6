"""`python -m train`: the allocator is set up before anything allocates, then the command line takes over."""

from train.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    from train.cli import main  # imports JAX, which allocates

    raise SystemExit(main())
