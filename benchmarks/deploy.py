"""How long does a deployed network take, in every format, beside float32?

    python benchmarks/deploy.py
    python benchmarks/deploy.py --network mobilenetv2 --size 32 --rounds 30

All threads of the process share one core. Every program takes its turn in every round, so that ratios hold where
milliseconds do not; medians. "of float32" is the time over that of float32 in onnxruntime, "of JAX" over that of the
jitted network that is trained. The network is untrained: its clips and batch statistics are those of random images.

"fast" rounds the residual branch and is another network; "int4" has kernels of 4 bits in a file of about half the size.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np

import qpde
from qpde import deploy
from qpde.bits import parse_bits
from qpde.models import calibrate_clips

sys.path.append(str(Path(__file__).parents[1]))  # train is not installed, it runs from the checkout
from train.trained.deployed import latencies
from train.trained.runtimes import float_runtimes, one_core, onnx_runtime, openvino_runtime, runtimes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--plain", action="store_true", help="not symmetric")
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    bits = parse_bits(options.bits)
    images = np.asarray(jax.random.normal(jax.random.key(0), (32, options.size, options.size, 3)))
    model, variables = network(options, bits, images)
    folded = deploy.settle(deploy.fold(model, variables))
    with tempfile.TemporaryDirectory() as scratch:
        programs, missing = runtimes(model, variables, folded, bits, images.shape[1:3], Path(scratch))
        floats, absent = float_runtimes(model, variables, Path(scratch))
        programs, missing = programs | floats, missing | absent
        programs["onnxruntime, fast"] = onnx_runtime(deploy.fold(model, variables), fast=True)
        programs["onnxruntime, int4"] = onnx_runtime(folded, kernel_bits=4)
        programs["OpenVINO, int4"] = openvino_runtime(folded, Path(scratch), kernel_bits=4)
        for name, reason in missing.items():
            print(f"{name}: not measured, {reason}")
        print(f"{options.network} {'plain' if options.plain else 'symmetric'} {options.bits}, settled, one core")
        print(f"{'':<28}{'batch':>6}{'ms':>10}{'of float32':>12}{'of JAX':>8}")
        for batch in options.batches:
            x = np.resize(images, (batch, *images.shape[1:]))
            with one_core():
                medians = latencies({k: partial(p.logits, x) for k, p in programs.items()}, options.rounds)
            for name, seconds in medians.items():
                ratios = (seconds / medians[base] for base in ("onnxruntime, float32", "JAX, fake-quantized"))
                shown = "".join(f"{ratio:{width}.2f}" for ratio, width in zip(ratios, (12, 8), strict=True))
                print(f"{name:<28}{batch:>6}{1000 * seconds:10.2f}{shown}", flush=True)


def network(options, bits, images):
    """The network with clips and batch statistics of the images, so that its codes are spread as they should be."""
    model = qpde.models.create(
        options.network,
        num_classes=10,
        symmetric=not options.plain,
        weight_bits=bits.weights,
        act_bits=bits.activations,
    )
    variables = jax.jit(model.init)(jax.random.key(1), images)
    variables = calibrate_clips(model, variables, images, train=True, method="rms")
    fit = jax.jit(partial(model.apply, train=True, momentum=0.0, mutable=["batch_stats", "spectral"]))
    return model, {**variables, **fit(variables, images)[1]}


if __name__ == "__main__":
    main()
