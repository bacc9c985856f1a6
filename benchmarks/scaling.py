"""What do more devices and more depth cost?

    python benchmarks/scaling.py                            # all, about ten minutes on two cores
    python benchmarks/scaling.py devices --rounds 3         # one part
    python benchmarks/scaling.py depth --depths 20 56

"devices": a training step of resnet20 W4A4, the same 128 images of 32x32 shared by 1, 2 and 4 simulated devices of one
CPU, in turns; medians. They share its cores, so a step can only use cores that idled before: what is seen is
what the splitting costs. "sums" and "gathers" count the operations of the compiled step that cross devices.

"depth": symmetric networks of ResNet's shape W4A4 with 3, 9 and 18 blocks a stage, their equal blocks as a scan or
unrolled: seconds to trace and compile the step, milliseconds a step, and the memory that it needs beside its arguments.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 128
DEVICES = (1, 2, 4)
PARTS = ("devices", "depth")


def main() -> None:
    """Starts one process for each part, because a process has one number of devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110], help="6 n + 2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if options.child:
        {"devices": measure_devices, "depth": measure_depth}[options.parts[0]](options)
        return
    for part in options.parts:
        depths = [str(depth) for depth in options.depths]
        arguments = [part, "--child", "--rounds", str(options.rounds), "--depths", *depths]
        subprocess.run([sys.executable, __file__, *arguments], check=True)


def measure_devices(options) -> None:
    """Times the step on meshes of each size."""
    _prepare(max(DEVICES))
    from timing import interleaved

    candidates, counts = {}, {}
    for devices in DEVICES:
        arguments, step = compiled_step(deep_net(20), devices=devices)
        text = step.as_text()
        counts[devices] = [
            text.count(f" {name}(") + text.count(f" {name}-start(") for name in ("all-reduce", "all-gather")
        ]
        candidates[devices] = _advancing(arguments, step)
    seconds = interleaved(candidates, rounds=options.rounds)
    print(f"\nresnet20, W4A4, {BATCH} images, {os.cpu_count()} cores")
    print(f"{'devices':<24}{'ms a step':>12}{'sums':>12}{'gathers':>12}")
    for devices, (sums, gathers) in counts.items():
        print(f"{devices:<24}{1000 * statistics.median(seconds[devices]):12.0f}{sums:12}{gathers:12}", flush=True)


def measure_depth(options) -> None:
    """Compiles and times networks of each depth, their loops in turns."""
    _prepare(1)
    from timing import interleaved

    print(f"\nsymmetric, W4A4, {BATCH} images, {os.cpu_count()} cores")
    print(f"{'depth':<24}{'compile s':>12}{'ms a step':>12}{'memory MiB':>12}")
    for depth in options.depths:
        candidates, compiled = {}, {}
        for loop in ("scan", "unroll"):
            start = time.perf_counter()
            arguments, step = compiled_step(deep_net(depth, loop=loop))
            compiled[loop] = (time.perf_counter() - start, step.memory_analysis().temp_size_in_bytes / 2**20)
            candidates[loop] = _advancing(arguments, step)
        seconds = interleaved(candidates, rounds=options.rounds)
        for loop, (compile_seconds, memory) in compiled.items():
            milliseconds = 1000 * statistics.median(seconds[loop])
            print(f"{f'{depth}, {loop}':<24}{compile_seconds:12.1f}{milliseconds:12.0f}{memory:12.0f}", flush=True)


def deep_net(depth: int, **options):
    """resnet20 with so many layers: the last block of each stage repeated."""
    import qpde

    if depth % 6 != 2 or depth < 14:
        raise ValueError(f"depth (={depth}) must be 6 n + 2 for n blocks a stage, n at least 2")
    model = qpde.models.create("resnet20", num_classes=10, weight_bits=4, act_bits=4, **options)
    blocks = (depth - 2) // 6
    return model.clone(architecture=model.architecture.with_blocks(*[blocks] * 3))


def compiled_step(model, *, devices: int = 1):
    """The arguments of the application's training step, and the step compiled for them."""
    import jax
    import numpy as np

    from train.config.images import Loss, Optimizer
    from train.host.mesh import make_mesh, put, replicated
    from train.steps.optimizer import create_optimizer
    from train.steps.state import create_state
    from train.steps.train_step import empty_totals, make_epoch_step, make_loss, make_train_step

    mesh = make_mesh(devices)
    images = np.random.default_rng(0).standard_normal((BATCH, 32, 32, 3), np.float32)
    key = jax.random.key(0, impl="rbg")
    variables = jax.jit(model.init)(key, images)
    optimizer = create_optimizer(Optimizer(learning_rate=1e-3), variables["params"], steps=10**6)
    prepare = lambda key, images, labels: (images, jax.nn.one_hot(labels, 10), labels)  # noqa: E731
    train_step = make_train_step(make_loss(model, Loss()), optimizer, prepare)
    step = make_epoch_step(train_step, lambda state, *batch: (batch, state.key), mesh=mesh)
    everything = (
        create_state(variables, optimizer, key),
        empty_totals(),
        None,
        images,
        np.arange(BATCH, dtype=np.int32) % 10,
    )
    arguments = put(everything, replicated(mesh))
    return arguments, step.lower(*arguments).compile()


def _advancing(arguments, step):
    """A callable that trains one step further."""
    state, totals, *others = arguments

    def advance():
        nonlocal state, totals
        state, totals = step(state, totals, *others)
        return totals

    return advance


def _prepare(devices: int) -> None:
    """Sets up the process as the application does."""
    sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
    from train.host.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    jax.config.update("jax_num_cpu_devices", devices)


if __name__ == "__main__":
    main()
