"""Small networks with clips and statistics from data, and their codes in the fake-quantized network."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from qpde import models, quantizers
from qpde.models import calibrate_clips
from qpde.models.images.blocks import Smoothing

KINDS = {
    "symmetric": ("resnet20", {}),
    "plain": ("resnet20", {"symmetric": False}),
    "tied": ("resnet20", {"norm": "tied"}),
    "spectral": ("resnet20", {"norm": "spectral"}),
    "precise": ("resnet20", {"residual": "precise"}),
    "per channel": ("resnet20", {"per_channel": True}),
    "huber": ("resnet20", {"smoothing": Smoothing(kind="huber", output=True)}),
    "isotropic": ("resnet20", {"smoothing": Smoothing(blocks=(1,), steps=2)}),
    "apot": ("resnet20", {"levels": "apot"}),
    "pot": ("resnet20", {"levels": "pot"}),
    "stable": ("stablenet20", {}),
    "inverted": ("mobilenetv2", {"symmetric": False, "signed_inputs": True}),
    "inverted symmetric": ("mobilenetv2", {"norm": "tied"}),
    "W8A8": ("resnet20", {"weight_bits": 8, "act_bits": 8}),
    "W2A2": ("resnet20", {"weight_bits": 2, "act_bits": 2}),
    "W3A32": ("resnet20", {"weight_bits": 3, "act_bits": 32}),
}


@lru_cache
def network(kind: str = "symmetric", size: int = 8, **more):
    """A network of two blocks, the first one strided, its collections, and images."""
    name, options = KINDS[kind]
    options = {"weight_bits": 4, "act_bits": 4, **options, **more}
    model = models.create(name, num_classes=5, head="scaled", **options)
    neck = 24 if model.neck_width else None
    stage = model.stages[2 if model.neck_width else 1]
    model = model.clone(stages=(stage[:2],), neck_width=neck)
    images = jax.random.normal(jax.random.key(1), (3, size, size, 3))
    variables = model.init(jax.random.key(0), images)
    for path in ("stem_norm", "neck_norm"):
        if path in variables["params"]:
            variables["params"][path]["bias"] += 0.1
    variables = calibrate_clips(model, variables, images, train=True, method="rms")
    fit = jax.jit(partial(model.apply, train=True, momentum=0.0, mutable=["batch_stats", "spectral"]))
    variables = {**variables, **fit(variables, images)[1]}
    return model, variables, np.asarray(images)


def fake_quantized(model, variables, images):
    """Logits, and what every quantizer of activations rounds to, in parts of its clip, by name."""

    def observe(x, clip, quantizer):
        if quantizer.is_weight or quantizer.bits is None or quantizer.bits >= 16:
            return jnp.zeros(()), clip
        options = {"levels": quantizer.levels, "signed": quantizer.signed}
        return quantizers.quantize_activation(x, clip, quantizer.bits, **options) / clip, clip

    logits, new = jax.jit(partial(model.apply, observe=observe, mutable=["observed"]))(variables, images)
    values, block = {}, 0
    for stage, name, _, count in model.stacks:
        for i in range(count):
            records = new["observed"][stage][name]["act_clips"]
            values |= {f"block{block}.q{k}": np.asarray(r[i]) for k, r in enumerate(records) if r[i].ndim}
            block += 1
    return np.asarray(logits), values


def flips(codes, other):
    """How many codes differ."""
    assert codes.keys() == other.keys()
    return sum(int((np.asarray(other[name], np.float32) != code).sum()) for name, code in codes.items())
