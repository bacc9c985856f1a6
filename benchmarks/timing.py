"""Side-by-side timing: every benchmark here measures its candidates in one process, in turns."""

import time
from collections.abc import Callable

import jax


def interleaved(
    functions: dict[str, Callable], rounds: int = 15, warmup: int = 2, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call of each function, one of each per round.

    Turns spread whatever else the machine does evenly over the candidates, so that ratios of medians or minima hold
    where the figures themselves do not. Results are waited for (`jax.block_until_ready`), also PyTorch's, which are
    ready on return.

    Args:
      functions: name -> callable without arguments.
      rounds: measured calls of each.   warmup: calls before, for compilation and caches.
      clock: seconds; `time.process_time` counts processor time, which a busy machine disturbs less.
    """
    seconds = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            if i >= warmup:
                seconds[name].append(clock() - start)
    return seconds
