"""What do exact sums cost, in evaluation, where networks have them, and in training, where they do not?

    taskset -c 0 python benchmarks/exact_sums.py --processor-time
    QPDE_NATIVE=0 taskset -c 0 python benchmarks/exact_sums.py --processor-time    # without native kernels

In evaluation a few-bit network convolves codes, whole numbers, and scales the sums. "codes" is that, "numbers" the same
network with sums of real numbers. Both take turns in one process; times are medians, the ratio is that of "codes".
"""

import argparse
import dataclasses
import statistics
import time
from functools import partial

import jax
from timing import interleaved

from qpde import Bits, models, native
from qpde.models.images.call import Call

NOTE_STEP = Call._note_step


def note_in_training(call, *arguments, **options):
    """`_note_step` as if the network were evaluated."""
    mode = call.mode
    call.mode = dataclasses.replace(mode, train=False)
    NOTE_STEP(call, *arguments, **options)
    call.mode = mode


SUMS = {"numbers": lambda *_, **__: None, "codes": note_in_training}


def programs(model, variables, x):
    """By name: evaluation and the gradient of a training step, with either kind of sums."""

    def loss(params, x):
        logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jax.nn.logsumexp(logits, axis=-1).mean()

    compiled = {}
    for name, note in SUMS.items():
        Call._note_step = note
        evaluation = jax.jit(partial(model.apply, variables)).lower(x).compile()
        training = jax.jit(jax.grad(loss)).lower(variables["params"], x).compile()
        compiled |= {
            ("evaluation", name): partial(evaluation, x),
            ("training", name): partial(training, variables["params"], x),
        }
    Call._note_step = NOTE_STEP
    return compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet20", "mobilenetv2"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor-time", action="store_true", help="count that; for busy machines")
    options = parser.parse_args()
    print(native.describe())
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (options.batch, 32, 32, 3)))
    clock = time.process_time if options.processor_time else time.perf_counter
    for name in options.nets:
        for symmetric in (True, False):
            bits = Bits(options.bits, options.bits)
            model = models.create(
                name, num_classes=10, symmetric=symmetric, weight_bits=bits.weights, act_bits=bits.activations
            )
            variables = models.calibrate_clips(model, jax.jit(model.init)(jax.random.key(1), x), x, train=True)
            seconds = interleaved(programs(model, variables, x), options.rounds, clock=clock)
            for what in ("evaluation", "training"):
                numbers, codes = (1e3 * statistics.median(seconds[what, sums]) for sums in SUMS)
                kind = f"{name} {'symmetric' if symmetric else 'plain'}"
                print(f"{kind:<24}{what:<12}{numbers:7.0f} ms{codes:7.0f} ms{codes / numbers:7.2f}", flush=True)


if __name__ == "__main__":
    main()
