"""What does it save that each block's output is computed once?

    taskset -c 0 python benchmarks/kept_outputs.py --processor-time

XLA's compiler for CPUs fuses what is elementwise into each of its uses, and so computes a chain of shortcuts again in
every block. `qpde.native.materialize` ends each block and stops that. "kept" is a training step of 4-bit weights and
activations with it, "anew" the same without. Both take turns in one process; times are medians, the ratio is that of
"kept".
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import jax
from timing import interleaved

from qpde import models, native

MATERIALIZE = native.materialize
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"symmetric": False},
    "plain, precise": {"symmetric": False, "residual": "precise"},
    "symmetric": {},
    "symmetric, precise": {"residual": "precise"},
    "tied, precise": {"norm": "tied", "step_size": "auto", "residual": "precise"},
}


def programs(model, variables, x):
    """By name: the gradient of a training step."""
    params = variables.pop("params")

    def loss(params, x):
        logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=list(variables))
        return jax.nn.logsumexp(logits, axis=-1).mean()

    compiled = {}
    for name, keep in (("kept", MATERIALIZE), ("anew", lambda x: x)):
        native.materialize = keep
        program = jax.jit(jax.grad(loss)).lower(params, x).compile()
        compiled[name] = partial(program, params, x)
    native.materialize = MATERIALIZE
    return compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet20", "stablenet20", "mobilenetv2"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="count that; for busy machines")
    options = parser.parse_args()
    print(native.describe())
    print(f"{'ms a step':<34}{'anew':>8}{'kept':>8}{'kept/anew':>11}")
    x = jax.random.normal(jax.random.key(0), (options.batch, 32, 32, 3))
    clock = time.process_time if options.processor_time else time.perf_counter
    for name in options.nets:
        for form in options.forms:
            model = models.create(name, num_classes=10, weight_bits=4, act_bits=4, **FORMS[form])
            variables = models.calibrate_clips(model, jax.jit(model.init)(jax.random.key(1), x), x, train=True)
            seconds = interleaved(programs(model, dict(variables), x), options.rounds, clock=clock)
            anew, kept = (1e3 * statistics.median(seconds[how]) for how in ("anew", "kept"))
            print(f"{name + ' ' + form:<34}{anew:8.0f}{kept:8.0f}{kept / anew:11.2f}", flush=True)


if __name__ == "__main__":
    main()
