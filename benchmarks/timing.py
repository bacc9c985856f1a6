"""Side-by-side timing: every benchmark here measures its candidates in one process, in turns."""

import time
from collections.abc import Callable

import jax


def interleaved(
    functions: dict[str, Callable], rounds: int = 15, warmup: int = 2, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call of each function, one of each per round.

    Turns spread whatever else the machine does evenly over the candidates, so that ratios of medians or minima hold
    where the figures themselves do not. Results are waited for (`jax.block_until_ready`), not PyTorch's, which are
    ready on return; on a GPU the function itself must wait for them.

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


def gpu_name() -> str:
    """JAX's name of the GPU; RuntimeError if there is none, where JAX alone would go on with the processor."""
    return jax.devices("gpu")[0].device_kind


def in_a_row(step: Callable, times: int, wait: Callable[[], None] = lambda: None) -> Callable:
    """A callable that takes so many steps, waits once and returns the last one's result, as training on a GPU does."""

    def steps():
        for _ in range(times):
            result = step()
        wait()
        return result

    return steps
