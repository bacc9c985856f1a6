"""What does it save that a training process keeps the memory it frees?

    python benchmarks/memory.py                  # ten seconds

x + 1 of 80 MiB, thirty times, in one process that gives its memory back as the C library likes and in one that keeps
it (`train.host.allocator`): page faults and milliseconds of a call, medians of the second half. 80 MiB are 20480 pages
and more than a thread's own heap holds. On a machine that is short of memory the two are alike.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

CALLS = 30


def main() -> None:
    """Starts one process for each way, because what the C library is told holds for the whole process."""
    if sys.argv[1:]:
        measure(keep=sys.argv[1] == "kept")
        return
    print(f"{'memory':<12}{'faults a call':>15}{'ms a call':>12}")
    for way in ("given back", "kept"):
        printed = subprocess.run([sys.executable, __file__, way], check=True, capture_output=True, text=True).stdout
        faults, milliseconds = printed.split()
        print(f"{way:<12}{faults:>15}{milliseconds:>12}")


def measure(*, keep: bool) -> None:
    """Prints page faults and milliseconds of a call."""
    sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
    from train.host.allocator import keep_freed_memory

    if keep and not keep_freed_memory():
        sys.exit("the C library is not glibc: nothing to compare")
    import jax
    import jax.numpy as jnp

    add, x = jax.jit(lambda x: x + 1), jnp.zeros(20 * 2**20)
    faults, seconds = [], []
    for _ in range(CALLS):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        add(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    half = CALLS // 2
    print(f"{statistics.median(faults[half:]):.0f} {1e3 * statistics.median(seconds[half:]):.1f}")


if __name__ == "__main__":
    main()
