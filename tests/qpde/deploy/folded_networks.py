"""Small networks with clips and statistics from data, and their codes in the fake-quantized network."""

import dataclasses
import subprocess
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from qpde import deploy, models, quantizers
from qpde.models import calibrate_clips
from qpde.models.options import Smoothing

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
    "expanded": ("stablenet20", {"norm": "tied", "expansion": 1.5}),
    "inverted": ("mobilenetv2", {"symmetric": False, "signed_inputs": True}),
    "inverted symmetric": ("mobilenetv2", {"norm": "tied"}),
    "W8A8": ("resnet20", {"weight_bits": 8, "act_bits": 8}),
    "W2A2": ("resnet20", {"weight_bits": 2, "act_bits": 2}),
    "W3A32": ("resnet20", {"weight_bits": 3, "act_bits": 32}),
}


@lru_cache
def network(kind: str = "symmetric", size: int = 8, whole: bool = False, **more):
    """A network of two blocks, the first one strided, or the whole one; its collections, and images."""
    name, options = KINDS[kind]
    options = {"weight_bits": 4, "act_bits": 4, **options, **more}
    architecture = models.ARCHITECTURES[name]
    neck = 24 if architecture.neck_width else None
    width_in, width_out, _, _, expansion = architecture.stages[2 if neck else 1]
    stages = ((width_in, width_out, 2, 2, expansion),)
    if not whole:
        architecture = dataclasses.replace(architecture, stages=stages, neck_width=neck)
    model = models.image_network(architecture, num_classes=5, head="scaled", **options)
    images = jax.random.normal(jax.random.key(1), (3, size, size, 3))
    variables = model.init(jax.random.key(0), images)
    for name in ("stem", "neck") if neck else ("stem",):
        variables["params"][name]["norm"]["bias"] += 0.1
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


MAIN = r"""
#include <stdio.h>
#include <string.h>
void network_run(const float *images, float *logits);
static const char *names[99];
static FILE *files[99];
void network_codes(const char *quantizer, const float *codes, int count) {
  char path[99];
  int i = 0;
  while (names[i] && strcmp(names[i], quantizer)) i++;
  if (!names[i]) {
    sprintf(path, "%s.bin", quantizer);
    names[i] = quantizer;
    files[i] = fopen(path, "wb");
  }
  fwrite(codes, 4, (size_t)count, files[i]);
}
int main(void) {
  static float images[PIXELS], logits[CLASSES];
  FILE *in = fopen("images", "rb"), *out = fopen("logits", "wb");
  while (fread(images, 4, PIXELS, in) == PIXELS) {
    network_run(images, logits);
    fwrite(logits, 4, CLASSES, out);
  }
  fclose(out);
  return 0;
}
"""
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")


def run_c(folded, images, folder, *flags):
    """Logits and codes of the compiled source."""
    (folder / "network.c").write_text(deploy.c_source(folded, image_size=images.shape[1:3], codes=True))
    (folder / "main.c").write_text(MAIN)
    images.tofile(folder / "images")
    sizes = (f"-DPIXELS={images[0].size}", f"-DCLASSES={folded.num_classes}")
    subprocess.run(["gcc", *STRICT, *sizes, *flags, "network.c", "main.c", "-lm", "-o", "main"], cwd=folder, check=True)
    subprocess.run(["./main"], cwd=folder, check=True)
    names = [op.out for op in folded.ops if ".q" in op.out]
    codes = {name: np.fromfile(folder / f"{name}.bin", np.float32) for name in names}
    return np.fromfile(folder / "logits", np.float32).reshape(len(images), -1), codes
