"""What does a certificate cost, by newton_steps of Newton's method, beside one run of the twin?

    python benchmarks/certificate.py
    taskset -c 0 python benchmarks/certificate.py --processor-time    # on a busy machine

"twin" is a compiled forward pass of the network with activations in high precision, in float32. "cheapest" is
`qpde.certify.certify` without a number of Newton steps; the other rows count those that it makes before it measures the
defects. 128 images of 32x32, 4 bits, medians. "constants" is `step_bounds`, on the host, once for a network.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
from timing import interleaved

import qpde
from qpde.certify.certificate import certify
from qpde.certify.step_bounds import step_bounds

sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
from train.host.allocator import keep_freed_memory

NETS = {"stablenet20": {"head": "scaled"}, "resnet20": {}}
STEPS = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="count processor time, not the wall clock")
    options = parser.parse_args()
    keep_freed_memory()
    clock = time.process_time if options.processor_time else time.perf_counter
    bits = qpde.Bits(4, 4)
    x = jax.random.normal(jax.random.key(0), (128, 32, 32, 3))
    print(f"{'net':<14}{'what':<16}{'ms':>9}{'runs of the twin':>18}")
    for net, changes in NETS.items():
        model = qpde.models.create(
            net, num_classes=10, norm="spectral", residual="precise", weight_bits=4, act_bits=4, **changes
        )
        variables = jax.jit(model.init)(jax.random.key(1), x)
        start = clock()
        steps = step_bounds(model, variables, x.shape[1:3], bits)
        constants = clock() - start
        twin = jax.jit(partial(model.apply, bits=bits.twin))
        proof = partial(certify, model, variables, x, bits, steps=steps)
        candidates = {"twin": partial(twin, variables, x), "cheapest": proof}
        candidates |= {f"{n} Newton steps": partial(proof, newton_steps=n) for n in STEPS}
        medians = {k: statistics.median(v) for k, v in interleaved(candidates, options.rounds, 1, clock=clock).items()}
        for name, seconds in medians.items():
            print(f"{net:<14}{name:<16}{1000 * seconds:9.0f}{seconds / medians['twin']:18.1f}", flush=True)
        print(f"{net:<14}{'constants':<16}{1000 * constants:9.0f}{constants / medians['twin']:18.1f}", flush=True)


if __name__ == "__main__":
    main()
