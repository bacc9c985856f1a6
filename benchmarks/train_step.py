"""What does a training step cost, beside the same network in PyTorch? How long does it compile, and what does it hold?

    python benchmarks/train_step.py                                  # all nets, one and two threads
    python benchmarks/train_step.py --threads 1 --nets resnet20      # one part
    python benchmarks/train_step.py --processor-time                 # on a busy machine
    python benchmarks/train_step.py race --device gpu                # without the table of compilation

A step is forward, backward, SGD with momentum and weight decay, on 128 images of 32x32, W4A4: 4-bit weights and
activations. "qpde" is the step of `train.steps.train_step.make_train_step`, without the guard and the choice of a
batch that a run adds; "torch" is benchmarks/torch_nets.py, eager, in the faster of its two memory layouts. Both run in
one process, in turns, on as many processors as threads; medians.
"memory" is what a compiled step of resnet56 needs beside its arguments, "compile" the seconds to trace and compile it.

On a GPU a measured call takes 20 steps in a row and waits once, and there are two more candidates: PyTorch's step in
each layout recorded as a CUDA graph. The fastest is named. Both sides may round the factors of products and
convolutions to TF32, JAX's default there, and both choose their algorithms by trying them out.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

NETS = ("resnet20", "stablenet20", "resnet56")
BATCH = 128
LAYOUTS = ("contiguous_format", "channels_last")
STEPS = {"cpu": 1, "gpu": 20}
"""In a measured call."""
LOOPS = {"cpu": ("scan", "unroll"), "gpu": ("scan",)}


def main() -> None:
    """Starts one process for each number of threads: thread pools are made when a process starts. On a GPU, none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("race", "compile", "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not the wall clock")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "gpu":
        if options.processor_time:
            parser.error("a GPU's time is not the processor's")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    if options.child or options.device == "gpu":
        measure(options)
        return
    for threads in options.threads:
        processors = sorted(os.sched_getaffinity(0))[:threads]
        arguments = [options.part, "--child", "--threads", str(threads)]
        arguments += ["--rounds", str(options.rounds), "--nets", *options.nets]
        if options.processor_time:
            arguments.append("--processor-time")
        subprocess.run(
            [sys.executable, __file__, *arguments],
            check=True,
            preexec_fn=lambda processors=processors: os.sched_setaffinity(0, processors),
        )


def measure(options) -> None:
    """Times every net on this process's processors, or its GPU, then what compiling the deepest costs."""
    sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
    from train.host.allocator import keep_freed_memory

    keep_freed_memory()
    import numpy as np

    clock = time.process_time if options.processor_time else time.perf_counter
    images = np.random.default_rng(0).standard_normal((BATCH, 32, 32, 3), np.float32)
    labels = np.arange(BATCH) % 10
    if options.part in ("race", "all"):
        race(options, images, labels, clock)
    if options.part in ("compile", "all"):
        compare_compilations(options, images, labels, clock)


def race(options, images, labels, clock) -> None:
    """Every net, beside PyTorch."""
    import torch
    import torch_gpu
    from timing import gpu_name, in_a_row, interleaved

    on_gpu = options.device == "gpu"
    if on_gpu:
        where, wait, digits = gpu_name(), torch.cuda.synchronize, 2
        torch_gpu.prepare()
    else:
        (threads,) = options.threads
        where, wait, digits = f"{threads} thread(s)", lambda: None, 0
        torch.set_num_threads(threads)
    what = "processor" if options.processor_time else "wall"
    print(f"\n{where}, {what} ms a step of {BATCH} images, W4A4")
    print(f"{'net':<24}{'qpde':>9}{'torch':>9}{'qpde/torch':>12}{'   fastest of torch' if on_gpu else ''}", flush=True)
    steps = STEPS[options.device]
    for net in options.nets:
        for symmetric in (True, False):
            candidates = {"qpde": in_a_row(qpde_step(net, symmetric, images, labels), steps)}
            for name, step in torch_steps(net, symmetric, images, labels, options.device).items():
                candidates[name] = in_a_row(step, steps, wait)
            seconds = interleaved(candidates, rounds=options.rounds, clock=clock)
            theirs = {name: 1000 * statistics.median(values) / steps for name, values in seconds.items()}
            ours, best = theirs.pop("qpde"), min(theirs, key=theirs.get)
            name = f"{net} {'symmetric' if symmetric else 'plain'}"
            row = f"{name:<24}{ours:9.{digits}f}{theirs[best]:9.{digits}f}{ours / theirs[best]:12.2f}"
            others = "; ".join(f"{name}: {value:.2f}" for name, value in theirs.items() if name != best)
            print(row + (f"   {best} (others: {others})" if on_gpu else ""), flush=True)


def compare_compilations(options, images, labels, clock) -> None:
    """What a compiled step of the deepest net costs, in time and memory."""
    print(f"\n{'resnet56 symmetric':<24}{'compile s':>12}{'memory MiB':>12}")
    for loop, remat in itertools.product(LOOPS[options.device], (False, True)):
        start = clock()
        _, compiled = compiled_step("resnet56", True, images, labels, loop=loop, remat=remat)
        seconds = clock() - start
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{loop + (', remat' if remat else ''):<24}{seconds:12.1f}{memory:12.0f}", flush=True)


def compiled_step(net, symmetric, images, labels, **options):
    """The first arguments of the application's training step, and the step compiled for them."""
    import jax
    import jax.numpy as jnp

    import qpde
    from train.config.images import Loss, Optimizer
    from train.steps.optimizer import create_optimizer
    from train.steps.state import create_state
    from train.steps.train_step import make_loss, make_train_step

    model = qpde.models.create(net, num_classes=10, symmetric=symmetric, weight_bits=4, act_bits=4, **options)
    key = jax.random.key(0, impl="rbg")
    variables = jax.jit(model.init)(key, images)
    optimizer = create_optimizer(Optimizer(learning_rate=1e-3, weight_decay=1e-4), variables["params"], steps=10**6)
    prepare = lambda key, images, labels: (images, jax.nn.one_hot(labels, 10), labels)  # noqa: E731
    step = make_train_step(make_loss(model, Loss()), optimizer, prepare)
    first = create_state(variables, optimizer, key)
    batch = (jnp.asarray(images), jnp.asarray(labels, jnp.int32))
    arguments = (first, batch, key, None)
    return arguments, jax.jit(step, donate_argnums=0).lower(*arguments).compile()


def qpde_step(net, symmetric, images, labels):
    """A callable that trains one step further."""
    (state, *others), step = compiled_step(net, symmetric, images, labels)

    def advance():
        nonlocal state
        state, metrics = step(state, *others)
        return metrics

    return advance


def torch_steps(net, symmetric, images, labels, device) -> dict:
    """The same in PyTorch: each layout by its name, on a GPU as it is and recorded."""
    import torch_gpu

    steps = {layout: torch_step(net, symmetric, images, labels, layout, device) for layout in LAYOUTS}
    if device == "gpu":
        for layout in LAYOUTS:
            name = f"{layout}, recorded"
            steps[name] = torch_gpu.recorded(name, torch_step(net, symmetric, images, labels, layout, device))
    return {name: step for name, step in steps.items() if step is not None}


def torch_step(net, symmetric, images, labels, layout, device):
    """One of them."""
    import torch
    import torch_nets

    layout, device = getattr(torch, layout), {"cpu": "cpu", "gpu": "cuda"}[device]
    model = torch_nets.create(net, symmetric=symmetric, weight_bits=4, act_bits=4)
    model = model.train().to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=layout).to(device)
    y = torch.from_numpy(labels).to(device)
    return lambda: torch_nets.train_step(model, optimizer, x, y)


if __name__ == "__main__":
    main()
