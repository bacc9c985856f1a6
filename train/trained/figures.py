"""What a page shows of a trained image network beyond its run's summary.json."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qpde.models
from qpde import stencils
from qpde.bits import Bits
from qpde.measure.distributions import Distribution, distributions
from qpde.measure.faithfulness import Faithfulness, compare
from qpde.measure.jacobians import jacobian_spectrum
from qpde.models import Smoothing, converge_norms
from qpde.models.layers import Mode
from qpde.overlays import overlay
from qpde.quantizers import quantize_activation
from train.trained.certificates import measure_images
from train.trained.finished import Finished

SCENE_COLUMNS = ("truth", "network", "its twin", "where they differ")

_SCENES = 3  # test images of a segmentation network that are shown
_MAPS = 4  # columns of the picture of feature maps
_POINTS = 4  # images at which Jacobians are taken
_RITZ = 24  # Lanczos steps of each


@dataclasses.dataclass(frozen=True)
class Maps:
    """Feature maps of one test image, at some blocks' outputs.

    Attributes:
      blocks: counted from 1.
      rows: by what was done to them, maps (H, W).
      errors: relative rounding error of all channels and some images, without and with smoothing, by block.
      spread: of the first and last of them, before and after smoothing, the histogram of all values / clip.
      smoothing: what was applied, its gamma2 the mean of the blocks.   is_own: whether the network itself has it.
    """

    blocks: list[int]
    rows: dict[str, list[np.ndarray]]
    errors: list[tuple[float, float]]
    spread: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
    smoothing: Smoothing
    is_own: bool


@dataclasses.dataclass(frozen=True)
class Measured:
    """All of it; what needs quantized activations is empty without them.

    Attributes:
      cost: of `qpde.models.summary`.   stages: blocks in each.
      by_bits: faithfulness by bits of the activations.
      inputs: of every block, the distribution of its input.
      spectra: by block, from 1, eigenvalues of the Jacobian's symmetric part and the gain, at some images.
      certified: by bits, of `train.trained.certificates.measure_images`; none of networks that are no chain of parts.
      scenes: of a segmentation network some test images by name, as `SCENE_COLUMNS` show them, uint8 (H, W, 3).
    """

    cost: qpde.models.Summary
    stages: list[int]
    spectra: dict[int, tuple[np.ndarray, float]]
    by_bits: dict[int, Faithfulness]
    inputs: list[Distribution]
    maps: Maps | None
    certified: dict[int, dict[str, np.ndarray]]
    scenes: dict[str, list[np.ndarray]]


def measure(finished: Finished, *, act_bits: tuple[int, ...], certify_at: tuple[int, ...], images: int) -> Measured:
    """Everything about one network.

    Args:
      finished: The network.
      act_bits: Bits of activations to run it at.
      certify_at: Bits of activations to certify it at.
      images: Test images to use, the first ones.
    """
    model = finished.model
    x, _ = next(finished.test_images(images))
    variables = converge_norms(model, finished.at(model.bits), x)
    is_quantized = model.bits.activations is not None
    is_proven = is_quantized and model.is_chain
    return Measured(
        cost=qpde.models.summary(model, finished.images.shape),
        stages=[len(blocks) for blocks in model.stages],
        spectra=_spectra(model, variables, x[:_POINTS]),
        by_bits=_by_bits(finished, act_bits, images) if is_quantized else {},
        inputs=_inputs(finished, variables, images) if is_quantized else [],
        maps=_maps(model, variables, x[:_POINTS]) if is_quantized else None,
        certified={a: measure_images(finished, a, images=images) for a in certify_at} if is_proven else {},
        scenes=_scenes(finished, variables) if finished.network.is_segmenting else {},
    )


def _scenes(finished: Finished, variables: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """Test images with their true classes, the predicted ones, the twin's, and where the two precisions differ."""
    model, stored = finished.model, next(iter(finished.images.in_order("test")))
    count, found = model.num_classes, {}
    for i, place in enumerate(np.linspace(0, len(stored.images) - 1, _SCENES).astype(int), start=1):
        image, truth = stored.images[place], stored.labels[place]
        x = finished.images.normalize(image[None])
        low, twin = (
            np.asarray(_logits(model, variables, x, bits).argmax(-1)[0]) for bits in (model.bits, model.bits.twin)
        )
        row = [overlay(image, labels, count) for labels in (truth, low, twin)]
        found[f"image {i}"] = [*row, overlay(image // 2, np.where(low == twin, -1, low), count, share=1.0)]
    return found


@partial(jax.jit, static_argnames="model")
def _logits(model, variables, x, bits):
    return model.apply(variables, x, bits=bits)


def _by_bits(finished, act_bits, images) -> dict[int, Faithfulness]:
    """One set of weights at several bits; batch statistics belong to each, those of the twin to all."""
    model = finished.model
    weights = model.weight_bits if model.weight_bits is None else jnp.int32(model.weight_bits)
    at = {a: Bits(weights, jnp.int32(a)) for a in act_bits}
    twin = finished.at(next(iter(at.values())).twin)
    return {
        a: compare(model, finished.at(bits), finished.test_images(images), bits, twin=twin) for a, bits in at.items()
    }


def _inputs(finished, variables, images) -> list[Distribution]:
    bits = finished.model.bits
    bits = bits._replace(activations=min(bits.activations, 8))
    batches = (x for x, _ in finished.test_images(images))
    return [d for d in distributions(finished.model, variables, batches, bits) if d.index == 0]


@partial(jax.jit, static_argnames="model")
def _states(model, variables, x, bits):
    return model.apply(variables, x, bits=bits, return_states=True)[1]


def _spectra(model, variables, x) -> dict[int, tuple[np.ndarray, float]]:
    """Of every block but the first that keeps the shape, at the states that the high-precision twin runs through."""
    bits = model.bits.twin
    states, found = _states(model, variables, x, bits), {}
    for i, (block, own, step_size, gamma2) in enumerate(model.steps(variables)):
        if model.follows[i] and states[i].shape == states[i - 1].shape:
            values, gains = _spectrum(block, own, states[i - 1], jnp.float32(step_size), bits, gamma2)
            found[i + 1] = (np.asarray(values).ravel(), float(jnp.max(gains)))
    return found


@partial(jax.jit, static_argnames=("block", "bits"))
def _spectrum(block, own, points, step_size, bits, gamma2):
    def step(y):
        return block(own, y, step_size, bits, Mode(), gamma2)[0]

    def at(point):
        found = jacobian_spectrum(step, point[None], method="lanczos", num=_RITZ, key=jax.random.key(0))
        return found.eigenvalues, found.singular_values[0]

    return jax.lax.map(at, points)


def _maps(model, variables, x) -> Maps:
    """Inputs of some blocks: as they are, rounded, smoothed, smoothed and then rounded."""
    steps = model.steps(variables)
    states = _states(model, variables, x, model.bits)
    possible = [i for i, follows in enumerate(model.follows) if follows]
    chosen = sorted({possible[round(k)] for k in np.linspace(0, len(possible) - 1, min(_MAPS, len(possible)))})
    own = [float(gamma2) for *_, gamma2 in steps if gamma2 is not None]
    smoothing = dataclasses.replace(steps[0][0].smoothing, gamma2=float(np.mean(own))) if own else Smoothing()
    rows: dict[str, list[np.ndarray]] = {"as it is": [], "rounded": [], "smoothed": [], "then rounded": []}
    errors, spread = [], {}
    for i in chosen:
        state, block = states[i - 1], steps[i][0]
        clip = block.clips_at(steps[i][1]["params"], model.bits)["act_clips"][0]
        levels = {"levels": block.levels, "signed": block.signed_inputs}

        def rounded(v, clip=clip, levels=levels):
            return quantize_activation(v, clip, model.bits.activations, **levels)

        smoothed = stencils.smooth(
            state, steps=smoothing.steps, gamma2=smoothing.gamma2, eps=smoothing.eps, kind=smoothing.kind
        )
        channel = int(jnp.argmax(state[0].std((0, 1))))
        pictures = (state, rounded(state), smoothed, rounded(smoothed))
        for row, picture in zip(rows.values(), pictures, strict=True):
            row.append(np.asarray(picture[0, :, :, channel]))
        errors.append((_relative(state, rounded(state)), _relative(smoothed, rounded(smoothed))))
        if i in (chosen[0], chosen[-1]):
            spread[f"block {i + 1}"] = {"before": _spread(state / clip), "after smoothing": _spread(smoothed / clip)}
    return Maps([i + 1 for i in chosen], rows, errors, spread, smoothing, bool(own))


def _relative(v, rounded) -> float:
    return float(jnp.linalg.norm(jnp.ravel(v - rounded)) / jnp.maximum(jnp.linalg.norm(jnp.ravel(v)), 1e-30))


def _spread(v) -> tuple[np.ndarray, np.ndarray]:
    counts, edges = np.histogram(np.asarray(v), bins=2000)
    return edges, counts


def as_histogram(distribution: Distribution) -> tuple[Any, Any]:
    """Edges in clips, and counts."""
    return distribution.edges / distribution.clip, distribution.counts
