"""What does a training step cost, beside the same network in PyTorch? How long does it compile, and what does it hold?

    python benchmarks/train_step.py                                  # all nets, one and two threads
    python benchmarks/train_step.py --threads 1 --nets resnet20      # one part
    python benchmarks/train_step.py --processor-time                 # on a busy machine

A step is forward, backward, SGD with momentum and weight decay, on 128 images of 32x32, W4A4: 4-bit weights and
activations. "qpde" is the step of `train.step.make_train_step`, without the guard and the choice of a batch that a run
adds; "torch" is benchmarks/torch_nets.py, eager, in the faster of its two memory layouts. Both run in one process, in
turns, on as many processors as threads; medians.
"memory" is what a compiled step of resnet56 needs beside its arguments, "compile" the seconds to trace and compile it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

NETS = ("resnet20", "stablenet20", "resnet56")
BATCH = 128


def main() -> None:
    """Starts one process for each number of threads: thread pools are made when a process starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not the wall clock")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options)
        return
    for threads in options.threads:
        processors = sorted(os.sched_getaffinity(0))[:threads]
        arguments = ["--child", "--threads", str(threads), "--rounds", str(options.rounds), "--nets", *options.nets]
        if options.processor_time:
            arguments.append("--processor-time")
        subprocess.run(
            [sys.executable, __file__, *arguments],
            check=True,
            preexec_fn=lambda processors=processors: os.sched_setaffinity(0, processors),
        )


def measure(options) -> None:
    """Times every net on this process's processors, then what compiling the deepest costs."""
    sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
    from train.memory import keep_freed_memory

    keep_freed_memory()
    import numpy as np
    import torch
    import torch_nets
    from timing import interleaved

    (threads,) = options.threads
    torch.set_num_threads(threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    images = np.random.default_rng(0).standard_normal((BATCH, 32, 32, 3), np.float32)
    labels = np.arange(BATCH) % 10
    what = "processor" if options.processor_time else "wall"
    print(f"\n{threads} thread(s), {what} ms a step of {BATCH} images, W4A4")
    print(f"{'net':<24}{'qpde':>9}{'torch':>9}{'qpde/torch':>12}")
    for net in options.nets:
        for symmetric in (True, False):
            candidates = {"qpde": qpde_step(net, symmetric, images, labels)}
            for layout in ("contiguous_format", "channels_last"):
                candidates[layout] = torch_step(torch, torch_nets, net, symmetric, images, labels, layout)
            seconds = interleaved(candidates, rounds=options.rounds, clock=clock)
            ours, *theirs = (1000 * statistics.median(values) for values in seconds.values())
            name = f"{net} {'symmetric' if symmetric else 'plain'}"
            print(f"{name:<24}{ours:9.0f}{min(theirs):9.0f}{ours / min(theirs):12.2f}", flush=True)
    print(f"\n{'resnet56 symmetric':<24}{'compile s':>12}{'memory MiB':>12}")
    for loop, remat in (("scan", False), ("scan", True), ("unroll", False), ("unroll", True)):
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
    from train.config import Loss, Optimizer
    from train.optimizer import create_optimizer
    from train.state import create_state
    from train.step import make_loss, make_train_step

    model = qpde.models.create(net, num_classes=10, symmetric=symmetric, weight_bits=4, act_bits=4, **options)
    key = jax.random.key(0, impl="rbg")
    variables = jax.jit(model.init)(key, images)
    optimizer = create_optimizer(Optimizer(learning_rate=1e-3, weight_decay=1e-4), variables["params"], steps=10**6)
    prepare = lambda key, images, labels: (images, jax.nn.one_hot(labels, 10))  # noqa: E731
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


def torch_step(torch, torch_nets, net, symmetric, images, labels, layout):
    """The same in PyTorch."""
    layout = getattr(torch, layout)
    model = torch_nets.create(net, symmetric=symmetric, weight_bits=4, act_bits=4).train().to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=layout)
    y = torch.from_numpy(labels)
    return lambda: torch_nets.train_step(model, optimizer, x, y)


if __name__ == "__main__":
    main()
