"""What a page shows of a trained image network beyond its run's summary.json.

Most of its time is compiling. So all images come in batches of one shape, bits are traced, and one program of a network
serves its accuracy at all bits, its predictions, and the states that spectra and feature maps are taken at.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import qpde.models
from qpde import stencils
from qpde.bits import Bits
from qpde.measure.distributions import Distribution, distribution
from qpde.measure.faithfulness import Faithfulness, compare, evaluate
from qpde.measure.jacobians import jacobian_spectrum
from qpde.models import Smoothing, converge_norms
from qpde.models.layers import Mode
from qpde.quantizers import quantize_activation
from train.data.batches import of_one_shape
from train.trained.certificates import measure_images
from train.trained.finished import Finished, traced

NEWTON_STEPS = 2
"""Steps of Newton's method before the page's proofs."""

_MAPS = 4  # columns of the picture of feature maps
_POINTS = 4  # images at which Jacobians are taken
_RITZ = 24  # Lanczos steps of each
_INPUTS = 64  # images whose activations are counted


@dataclasses.dataclass(frozen=True)
class Maps:
    """Feature maps of one test image, at some blocks' outputs.

    Attributes:
      blocks: Counted from 1.
      rows: By what was done to them, maps (H, W).
      errors: Relative rounding error of all channels and some images, by block; with smoothing, a pair of without and
        with.
      spread: Histogram of all values / clip, of the first and the last of these blocks, before and after smoothing.
      smoothing: What was applied, its gamma2 the mean of the blocks. None where nothing was.
      is_own: Whether the network itself has it.
    """

    blocks: list[int]
    rows: dict[str, list[np.ndarray]]
    errors: list[tuple[float, ...]]
    spread: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
    smoothing: Smoothing | None
    is_own: bool


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network and its twin take the test images for, (N,) each.

    Attributes:
      images: The images as they are stored, (N, H, W, C) bytes.
      labels: Their classes.
      predicted: By the network at its own bits.
      twin: By its high-precision twin; None where no activation is quantized.
    """

    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    twin: np.ndarray | None

    @property
    def is_right(self) -> np.ndarray:
        """Whether the network is right, (N,)."""
        return self.predicted == self.labels


@dataclasses.dataclass(frozen=True)
class Measured:
    """All of it; what needs quantized activations is empty without them.

    Attributes:
      cost: Result of `qpde.models.summary`.
      stages: Number of blocks in each.
      classes: Names of the classes.
      data: Fingerprint of the images.
      about: Where the network came from.
      bits: The network's own.
      test_count: Number of all test images, where it is known.
      predictions: At the network's own bits.
      spectra: By block, from 1, eigenvalues of the Jacobian's symmetric part at some images.
      by_bits: Faithfulness by bits of the activations.
      inputs: Distribution of every block's input.
      maps: Feature maps.
      certified: By bits, results of `train.trained.certificates.measure_images`.
    """

    cost: qpde.models.Summary
    stages: list[int]
    classes: tuple[str, ...]
    data: str
    about: dict[str, Any]
    bits: Bits
    test_count: int | None
    predictions: Predictions
    spectra: dict[int, np.ndarray]
    by_bits: dict[int, Faithfulness]
    inputs: list[Distribution]
    maps: Maps | None
    certified: dict[int, dict[str, np.ndarray]]


def measure(
    finished: Finished,
    *,
    act_bits: tuple[int, ...],
    certify_at: tuple[int, ...],
    images: int,
    certify_images: int,
    smoothing: bool = False,
) -> Measured:
    """Everything about one network.

    Args:
      finished: The network.
      act_bits: Bits of activations to run it at.
      certify_at: Bits of activations to certify it at.
      images: Test images to use, the first ones.
      certify_images: How many of these to certify.
      smoothing: Whether to smooth the feature maps of a network that does not smooth, for its page.
    """
    model, bits = finished.model, traced(finished.model.bits)
    batches = [x for x, _ in of_one_shape(finished.test_images(images))]
    variables = converge_norms(model, finished.at(bits), batches[0][:1], bits=bits)
    is_quantized, certified = model.bits.activations is not None, min(images, certify_images)
    states = [evaluate(model, variables, batches[0], at)[1] for at in (bits.twin, bits)]
    return Measured(
        cost=qpde.models.summary(model, finished.images.shape),
        stages=[len(blocks) for blocks in model.stages],
        classes=tuple(map(str, finished.images.stored.classes)),
        data=finished.images.fingerprint,
        about=finished.network.about,
        bits=model.bits,
        test_count=len(finished.images.stored.test.labels) or None,
        predictions=_predictions(finished, variables, batches, images),
        spectra=_spectra(model, variables, [s[:_POINTS] for s in states[0]]),
        by_bits=faithfulness_by_bits(finished, act_bits, images) if is_quantized else {},
        inputs=_inputs(model, variables, batches[0][:_INPUTS], states[1]) if is_quantized else [],
        maps=_maps(model, variables, [s[:_POINTS] for s in states[1]], smoothing) if is_quantized else None,
        certified=_certified(finished, certify_at, certified) if is_quantized else {},
    )


def _certified(finished: Finished, certify_at: tuple[int, ...], images: int) -> dict[int, dict[str, np.ndarray]]:
    """Proofs by the constants of the steps: the page shows how close their bounds are."""
    return {a: measure_images(finished, a, images=images, newton_steps=NEWTON_STEPS) for a in certify_at}


def _predictions(finished: Finished, variables, batches: Sequence[Array], images: int) -> Predictions:
    model, bits = finished.model, traced(finished.model.bits)
    splits, count = [], 0
    for split in finished.images.in_order("test"):
        splits.append(split)
        count += len(split.labels)
        if count >= images:
            break

    def predicted(variables, bits):
        logits = [np.asarray(evaluate(model, variables, x, bits)[0]) for x in batches]
        return np.concatenate(logits)[: min(images, count)].argmax(-1)

    pixels = np.concatenate([np.asarray(split.images) for split in splits])[:images]
    labels = np.concatenate([np.asarray(split.labels) for split in splits])[:images]
    twin = None if bits.activations is None else predicted(finished.at(bits.twin), bits.twin)
    return Predictions(pixels, labels, predicted(variables, bits), twin)


def faithfulness_by_bits(finished, act_bits, images) -> dict[int, Faithfulness]:
    """One set of weights at several bits; batch statistics belong to each, those of the twin to all."""
    model = finished.model
    at = {a: traced(Bits(model.weight_bits, a)) for a in act_bits}
    twin = finished.at(next(iter(at.values())).twin)
    return {
        a: compare(model, finished.at(bits), finished.test_images(images), bits, twin=twin) for a, bits in at.items()
    }


def _inputs(model, variables, x, states) -> list[Distribution]:
    """What enters each block: what the stem makes of x, and what the blocks before it make of that."""
    entering = [model.bound_parts(variables)[0](x, Mode()), *(state[:_INPUTS] for state in states[:-1])]
    found = []
    for i, (state, (block, own, *_)) in enumerate(zip(entering, model.steps(variables), strict=True)):
        clip = block.clips_at(own["params"], model.bits)["act_clips"][0]
        options = {"bits": min(model.bits.activations, 8), "signed": block.signed_inputs, "levels": block.levels}
        found.append(distribution(state, clip, block=i, **options))
    return found


def _spectra(model, variables, states) -> dict[int, np.ndarray]:
    """Eigenvalues of every block but the first that keeps the shape, at states of the high-precision twin."""
    bits, found = model.bits.twin, {}
    for i, (block, own, step_size, gamma2) in enumerate(model.steps(variables)[1:], 1):
        if states[i].shape == states[i - 1].shape:
            values = _spectrum(block, own, states[i - 1], jnp.float32(step_size), bits, gamma2)
            found[i + 1] = np.asarray(values).ravel()
    return found


@partial(jax.jit, static_argnames=("block", "bits"))
def _spectrum(block, own, points, step_size, bits, gamma2):
    def step(y):
        return block(own, y, step_size, bits, Mode(), gamma2)[0]

    def at(point):
        found = jacobian_spectrum(step, point[None], method="lanczos", num=_RITZ, key=jax.random.key(0))
        return found.eigenvalues  # the compiler leaves out the gain, which would double its work

    return jax.lax.map(at, points)


def _maps(model, variables, states, smooths_all: bool) -> Maps:
    """Inputs of some blocks: as they are and rounded, and where asked for smoothed, and smoothed and then rounded."""
    steps = model.steps(variables)
    chosen = sorted({round(k) for k in np.linspace(1, len(steps) - 1, min(_MAPS, len(steps) - 1))})
    own = [float(gamma2) for *_, gamma2 in steps if gamma2 is not None]
    smoothing = Smoothing() if smooths_all else None
    if own:
        smoothing = dataclasses.replace(steps[0][0].smoothing or Smoothing(), gamma2=float(np.mean(own)))
    rows: dict[str, list[np.ndarray]] = {"as it is": [], "rounded": []}
    if smoothing is not None:
        rows |= {"smoothed": [], "then rounded": []}
    errors, spread = [], {}
    for i in chosen:
        state, block = states[i - 1], steps[i][0]
        clip = block.clips_at(steps[i][1]["params"], model.bits)["act_clips"][0]
        # Static, so one program serves all blocks whose maps have the same shape.
        levels = (model.bits.activations, block.levels, block.signed_inputs)
        pictures = _treated(state, clip, smoothing, *levels)
        channel = int(np.argmax(np.asarray(state[0]).std((0, 1))))
        for row, picture in zip(rows.values(), pictures, strict=True):
            row.append(np.asarray(picture[0, :, :, channel]))
        errors.append(tuple(_relative(*pair) for pair in zip(pictures[::2], pictures[1::2], strict=True)))
        if smoothing is not None and i in (chosen[0], chosen[-1]):
            before, after = (np.asarray(v) / float(clip) for v in pictures[::2])
            spread[f"block {i + 1}"] = {"before": _spread(before), "after smoothing": _spread(after)}
    return Maps([i + 1 for i in chosen], rows, errors, spread, smoothing, bool(own))


@partial(jax.jit, static_argnames=("smoothing", "bits", "levels", "signed"))
def _treated(x, clip, smoothing, bits, levels, signed):
    """Feature maps, each followed by itself rounded: as they are, and smoothed where there is a smoothing."""
    maps = [x]
    if smoothing is not None:
        s = smoothing
        maps.append(stencils.smooth(x, steps=s.steps, gamma2=s.gamma2, eps=s.eps, kind=s.kind))
    return [v for m in maps for v in (m, quantize_activation(m, clip, bits, levels=levels, signed=signed))]


def _relative(v, rounded) -> float:
    v, rounded = np.asarray(v, np.float64), np.asarray(rounded, np.float64)
    return float(np.linalg.norm(v - rounded) / max(float(np.linalg.norm(v)), 1e-30))


def _spread(v) -> tuple[np.ndarray, np.ndarray]:
    counts, edges = np.histogram(v, bins=2000)
    return edges, counts


def as_histogram(distribution: Distribution) -> tuple[Any, Any]:
    """Edges in clips, and counts."""
    return distribution.edges / distribution.clip, distribution.counts
