"""What does smoothing cost, beside a copy of the same array and beside scikit-image?

    python benchmarks/smoothing.py
    taskset -c 0 python benchmarks/smoothing.py --processor-time    # on a busy machine

A compiled copy reads and writes every number once: no smoothing can be faster, and "copies" says how many of them a
step costs. "GB/s" counts those same bytes, one read and one write, whatever a step moves beyond them. "gradient" is
the value and the vector-Jacobian product together. `numpy` is the isotropic step as anyone would write it,
`chambolle` one iteration of skimage.restoration.denoise_tv_chambolle, the usual solver of the same model. Medians.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from skimage.restoration import denoise_tv_chambolle
from timing import interleaved

from qpde.stencils import implicit_step, max_stable_step, smooth, tv_step

sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
from train.host.allocator import keep_freed_memory

EPS = 0.1
SHAPES = {"feature maps": (128, 32, 32, 16), "late feature maps": (128, 8, 8, 64), "image": (1, 512, 512, 3)}
CHAMBOLLE_ITERATIONS = 4


def numpy_step(x, gamma2):
    along_h = np.diff(x, axis=1, append=x[:, -1:])
    along_w = np.diff(x, axis=2, append=x[:, :, -1:])
    scale = 1 / np.sqrt(along_h * along_h + along_w * along_w + np.float32(EPS * EPS))
    along_h *= scale
    along_w *= scale
    divergence = along_h + along_w
    divergence[:, 1:] -= along_h[:, :-1]
    divergence[:, :, 1:] -= along_w[:, :, :-1]
    return x + np.float32(gamma2) * divergence


def candidates(x):
    """name -> (call without arguments, steps or iterations in it)."""
    kinds = ("isotropic", "anisotropic", "huber", "linear", "perona_malik_1")
    steps = {kind: partial(tv_step, gamma2=max_stable_step(eps=EPS, kind=kind), eps=EPS, kind=kind) for kind in kinds}
    tight = {"gamma2": max_stable_step(eps=EPS), "eps": EPS}
    steps |= {
        "isotropic, periodic": partial(tv_step, boundary="periodic", **tight),
        "smooth, 3 steps": partial(smooth, steps=3, **tight),
        "implicit": partial(implicit_step, **tight),
    }
    compiled = {"copy": jax.jit(lambda x: x + 1)} | {name: jax.jit(step) for name, step in steps.items()}

    def value_and_pullback(step, x, cotangent):
        y, pullback = jax.vjp(step, x)
        return y, pullback(cotangent)

    for name in ("isotropic", "huber", "smooth, 3 steps", "implicit"):
        compiled[f"{name}, gradient"] = partial(jax.jit(partial(value_and_pullback, steps[name])), cotangent=x)

    # Chambolle takes one image of many channels, one after the other: contiguous ones are kindest to it.
    planes = np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)).reshape(-1, *x.shape[1:3])
    chambolle = partial(denoise_tv_chambolle, planes, weight=EPS, eps=0, channel_axis=0)
    return {name: partial(call, x) for name, call in compiled.items()} | {
        "numpy": partial(numpy_step, np.asarray(x), tight["gamma2"]),
        f"chambolle, {CHAMBOLLE_ITERATIONS} iterations": partial(chambolle, max_num_iter=CHAMBOLLE_ITERATIONS),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processor-time", action="store_true", help="count processor instead of wall time")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    keep_freed_memory()  # as training does; otherwise page faults, not steps, are measured

    for name, shape in SHAPES.items():
        x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        seconds = interleaved(candidates(x), rounds=options.rounds, clock=clock)
        copy = statistics.median(seconds["copy"])
        print(f"\n{name} {shape}\n{'':28}{'ms':>9}{'GB/s':>8}{'copies':>8}")
        for candidate, times in seconds.items():
            took = statistics.median(times) / (CHAMBOLLE_ITERATIONS if candidate.startswith("chambolle") else 1)
            label = "chambolle, per iteration" if candidate.startswith("chambolle") else candidate
            print(f"{label:28}{1e3 * took:9.2f}{2 * x.nbytes / took / 1e9:8.1f}{took / copy:8.1f}")


if __name__ == "__main__":
    main()
