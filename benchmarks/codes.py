"""What does a convolution of codes cost, beside one of real numbers?

    python benchmarks/codes.py                     # processor time of one thread

Codes are whole numbers, which native kernels multiply as integers (qpde/native): here 0 to 15, and -7 to 7 in the
kernel. "halves" are the same numbers and a half, which they multiply as floats. Whole networks: exact_sums.py.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

BATCH = 128
SHAPES = [(3, 1, 32, 16, 16), (3, 1, 16, 32, 32), (3, 1, 8, 64, 64), (3, 2, 32, 16, 32), (1, 1, 32, 16, 96)]
"""(taps, stride, size, c_in, c_out)"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before JAX makes its threads
    sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
    from train.host.allocator import keep_freed_memory

    keep_freed_memory()
    from timing import interleaved

    def medians(candidates):
        seconds = interleaved(candidates, options.rounds, clock=time.process_time)
        return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}

    from qpde import native

    print(native.describe())
    print(f"{'ms, processor':<32}{'codes':>9}{'halves':>9}{'codes/halves':>14}")
    for shape in SHAPES:
        ms = medians({**convolutions(*shape), **convolutions(*shape, adjoint=True)})
        taps, stride, size, c_in, c_out = shape
        for name in ("conv", "adjoint"):
            codes, halves = ms[f"{name} codes"], ms[f"{name} halves"]
            row = f"{c_in}->{c_out} {size}x{size} k{taps} s{stride} {name}"
            print(f"{row:<32}{codes:9.2f}{halves:9.2f}{codes / halves:14.2f}", flush=True)


def convolutions(taps, stride, size, c_in, c_out, *, adjoint=False):
    import jax
    import numpy as np

    from qpde import operators

    rng = np.random.default_rng(0)
    images = (BATCH, size // stride, size // stride, c_out) if adjoint else (BATCH, size, size, c_in)
    x, kernel = rng.integers(0, 16, images), rng.integers(-7, 8, (taps, taps, c_in, c_out))
    if adjoint:
        f = jax.jit(lambda x, k: operators.conv_adjoint(x, k, stride=stride, size=(size, size)))
    else:
        f = jax.jit(lambda x, k: operators.conv(x, k, stride=stride))

    def candidate(add):
        arguments = [jax.device_put((a + add).astype(np.float32)) for a in (x, kernel)]
        return lambda: f(*arguments)

    name = "adjoint" if adjoint else "conv"
    return {f"{name} codes": candidate(0), f"{name} halves": candidate(0.5)}


if __name__ == "__main__":
    main()
