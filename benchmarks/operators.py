"""How fast are the convolutions of a training step, beside the compiler's own and beside PyTorch?

    taskset -c 0 python benchmarks/operators.py --threads 1
    python benchmarks/operators.py --threads 2

Batch 128, the shapes of the published nets; milliseconds (minimum over the rounds). `lax` is the compiler's own
convolution and its own gradients, `torch` PyTorch's on contiguous NCHW (its default), `torch cl` on channels-last
tensors. The last table repeats the kernel's gradient inside `lax.scan`, where a stage of equal blocks lives.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import torch
from jax import lax
from timing import interleaved

from qpde.operators import conv, depthwise

BATCH = 128
# c_in, c_out, size of the image, kernel, stride
CONVOLUTIONS = [
    (3, 16, 32, 3, 1),
    (16, 16, 32, 3, 1),
    (32, 32, 16, 3, 1),
    (64, 64, 8, 3, 1),
    (16, 32, 32, 3, 2),
    (32, 64, 16, 3, 2),
    (16, 32, 32, 1, 2),
    (32, 64, 16, 1, 2),
    (16, 96, 32, 1, 1),
    (192, 32, 16, 1, 1),
]
# channels, size of the image, stride
DEPTHWISE = [(96, 32, 1), (144, 16, 1), (144, 32, 2), (384, 8, 1)]


def compiler_conv(x, kernel, *, stride=1):
    pads = [((k - 1) // 2,) * 2 for k in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def jax_candidates(name, f, x, kernel):
    """Forward pass and both gradients, compiled one by one."""
    y = jax.jit(f)(x, kernel)
    input_gradient = jax.jit(lambda y: jax.vjp(lambda x: f(x, kernel), x)[1](y)[0])
    kernel_gradient = jax.jit(lambda x, y: jax.vjp(lambda k: f(x, k), kernel)[1](y)[0])
    forward = jax.jit(f)
    return {
        f"forward {name}": lambda: forward(x, kernel),
        f"input {name}": lambda: input_gradient(y),
        f"kernel {name}": lambda: kernel_gradient(x, y),
    }


def torch_candidates(name, layout, c_in, c_out, size, k, stride, groups=1):
    x = torch.randn(BATCH, c_in, size, size).contiguous(memory_format=layout)
    kernel = torch.randn(c_out, c_in // groups, k, k).contiguous(memory_format=layout)
    geometry = ([stride, stride], [k // 2, k // 2], [1, 1], False, [0, 0], groups)
    y = torch.ops.aten.convolution(x, kernel, None, *geometry)
    backward = partial(torch.ops.aten.convolution_backward, y, x, kernel, None, *geometry)
    return {
        f"forward {name}": lambda: torch.ops.aten.convolution(x, kernel, None, *geometry),
        f"input {name}": lambda: backward([True, False, False])[0],
        f"kernel {name}": lambda: backward([False, True, False])[1],
    }


def candidates(c_in, c_out, size, k, stride, groups=1):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (BATCH, size, size, c_in))
    kernel = jax.random.normal(keys[1], (k, k, c_in // groups, c_out))
    ours = conv if groups == 1 else depthwise
    return {
        **jax_candidates("qpde", partial(ours, stride=stride), x, kernel),
        **jax_candidates("lax", partial(compiler_conv, stride=stride), x, kernel),
        **torch_candidates("torch", torch.contiguous_format, c_in, c_out, size, k, stride, groups),
        **torch_candidates("torch cl", torch.channels_last, c_in, c_out, size, k, stride, groups),
    }


def scanned(f, channels, size, steps=3):
    """Gradient of a scan of `steps` convolutions: forward, input and kernel gradients together."""
    x = jax.random.normal(jax.random.key(0), (BATCH, size, size, channels))
    kernels = jax.random.normal(jax.random.key(1), (steps, 3, 3, channels, channels)) / (3 * channels**0.5)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(lax.scan(lambda x, k: (f(x, k), None), x, k)[0] ** 2)))
    return lambda: gradient(kernels)


def print_rows(title, seconds):
    columns = ["qpde", "lax", "torch", "torch cl"]
    for part in ("forward", "input", "kernel"):
        row = [1e3 * min(seconds[f"{part} {c}"]) for c in columns]
        print(f"{title:>20} {part:>8} " + " ".join(f"{t:9.2f}" for t in row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="one thread on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure = partial(
        interleaved, rounds=options.rounds, clock=time.process_time if options.processor_time else time.perf_counter
    )

    print(f"{'':>29} {'qpde':>9} {'lax':>9} {'torch':>9} {'torch cl':>9}   ms")
    for shape in CONVOLUTIONS:
        c_in, c_out, size, k, stride = shape
        print_rows(f"{c_in}->{c_out} {size}x{size} k{k} s{stride}", measure(candidates(*shape)))
    for channels, size, stride in DEPTHWISE:
        shape = (channels, channels, size, 3, stride, channels)
        print_rows(f"depthwise {channels} {size}x{size} s{stride}", measure(candidates(*shape)))
    print("\ngradient of three convolutions in a scan, ms")
    for channels, size in [(16, 32), (32, 16), (64, 8)]:
        seconds = measure({name: scanned(f, channels, size) for name, f in (("qpde", conv), ("lax", compiler_conv))})
        print(f"{channels:>12} {size}x{size} " + "  ".join(f"{k} {1e3 * min(t):.1f}" for k, t in seconds.items()))


if __name__ == "__main__":
    main()
