"""What a page shows of a trained segmentation network beyond its run's summary.json."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qpde.models
from qpde.measure.faithfulness import Faithfulness, evaluate
from qpde.overlays import overlay
from train.trained.certificates import certified_maps
from train.trained.figures import faithfulness_by_bits
from train.trained.finished import Finished, traced

COLUMNS = ("truth", "network", "its twin", "where they differ")
"""What is shown of a scene."""

PROOFS = ("changed", "proven", "the same, unproven")
"""What a pixel is by its proof: 0 where rounding changes its class, 1 where it provably does not, 2 elsewhere."""

_SCENES = 3
_SMOOTHED = 4  # blocks whose maps are shown with and without smoothing


@dataclasses.dataclass(frozen=True)
class SmoothedMaps:
    """Feature maps of a network that smooths, and of the same network with its smoothing turned off.

    Attributes:
      blocks: Names of some blocks.
      rows: By heading a map (H, W) for each of them, of the channel of largest variation.
      changes: |x - y| / |x| of all channels, x with smoothing and y without, by block.
    """

    blocks: list[str]
    rows: dict[str, list[np.ndarray]]
    changes: list[float]


@dataclasses.dataclass(frozen=True)
class MeasuredScenes:
    """All of it.

    Attributes:
      cost: Result of `qpde.models.summary`.
      about: Where the network came from.
      by_bits: Faithfulness by bits of the activations; empty where they are not quantized.
      scenes: Some test images by name, as `COLUMNS` show them, uint8 (H, W, 3).
      proofs: The same images, for each of the bits a picture of what `PROOFS` names; empty without quantizers.
      shares: By bits the share of their pixels that each of `PROOFS` has.
      newton_steps: Steps of Newton's method that the proofs took.
      smoothing: Of a network that smooths, what it makes of feature maps of the first image.
    """

    cost: qpde.models.Summary
    about: dict[str, Any]
    by_bits: dict[int, Faithfulness]
    scenes: dict[str, list[np.ndarray]]
    proofs: dict[str, list[np.ndarray]]
    shares: dict[int, np.ndarray]
    newton_steps: int
    smoothing: SmoothedMaps | None


def measure_scenes(
    finished: Finished, *, act_bits: tuple[int, ...], certify_at: tuple[int, ...] = (), images: int
) -> MeasuredScenes:
    """Measure one segmentation network.

    Args:
      finished: The network.
      act_bits: Bits of activations to run it at.
      certify_at: Bits of activations to certify the shown scenes at.
      images: Test images to use, the first ones.
    """
    model, chosen = finished.model, _chosen(finished, images)
    newton_steps = model.depth // 2  # the twin itself comes after as many as the network is deep
    proofs, shares = _proofs(finished, chosen, certify_at if model.bits.activations else (), newton_steps)
    return MeasuredScenes(
        cost=qpde.models.summary(model, finished.images.shape),
        about=finished.network.about,
        by_bits={} if model.bits.activations is None else faithfulness_by_bits(finished, act_bits, images),
        scenes=_scenes(finished, chosen),
        proofs=proofs,
        shares=shares,
        newton_steps=newton_steps,
        smoothing=_smoothed(finished, chosen[0][0]) if any(block.smoothing for block in model.blocks) else None,
    )


def _chosen(finished: Finished, images: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some of the first test images, with their label maps."""
    stored = next(iter(finished.images.in_order("test")))
    places = np.linspace(0, min(images, len(stored.images)) - 1, _SCENES).astype(int)
    return [(stored.images[place], stored.labels[place]) for place in dict.fromkeys(places.tolist())]


def _proofs(finished: Finished, chosen, certify_at, newton_steps):
    """Pictures by image, and shares by bits."""
    pictures: dict[str, list[np.ndarray]] = {f"image {i}": [] for i, _ in enumerate(chosen, start=1)}
    shares: dict[int, np.ndarray] = {}
    for act_bits in certify_at:
        proofs = certified_maps(finished, act_bits, [image for image, _ in chosen], newton_steps=newton_steps)
        shares[act_bits] = np.bincount(np.stack(proofs).ravel(), minlength=len(PROOFS)) / np.stack(proofs).size
        for own, (image, _), proof in zip(pictures.values(), chosen, proofs, strict=True):
            own.append(overlay(image, proof, len(PROOFS)))
    return pictures if certify_at else {}, shares


def _smoothed(finished: Finished, image: np.ndarray) -> SmoothedMaps:
    model, variables = finished.model, finished.at(finished.model.bits)
    x, bits = finished.images.normalize(image[None]), traced(model.bits)
    off = {**variables, "smoothing": {"scale": jnp.float32(0)}}
    with_smoothing, without = (evaluate(model, v, x, bits)[1] for v in (variables, off))
    places = np.linspace(0, len(model.blocks) - 1, min(_SMOOTHED, len(model.blocks))).round().astype(int).tolist()
    rows: dict[str, list[np.ndarray]] = {"with smoothing": [], "without": [], "what it changed": []}
    changes = []
    for i in places:
        after, before = (np.asarray(states[i][0]) for states in (with_smoothing, without))
        channel = int(np.argmax(after.std((0, 1))))
        maps = (after[..., channel], before[..., channel], np.abs(after - before)[..., channel])
        for row, picture in zip(rows.values(), maps, strict=True):
            row.append(picture)
        changes.append(float(np.linalg.norm(after - before) / max(float(np.linalg.norm(after)), 1e-30)))
    names = model.block_names()
    return SmoothedMaps([names[i] for i in places], rows, changes)


def _scenes(finished: Finished, chosen) -> dict[str, list[np.ndarray]]:
    model, found = finished.model, {}
    count = model.num_classes
    at = [(bits, finished.at(bits)) for bits in (model.bits, model.bits.twin)]
    for i, (image, truth) in enumerate(chosen, start=1):
        x = finished.images.normalize(image[None])
        low, twin = (np.asarray(_classes(model, variables, x, bits))[0] for bits, variables in at)
        shown = [overlay(image, labels, count) for labels in (truth, low, twin)]
        found[f"image {i}"] = [*shown, overlay(image // 2, np.where(low == twin, -1, low), count, share=1.0)]
    return found


@partial(jax.jit, static_argnames=("model", "bits"))
def _classes(model, variables, x, bits):
    return model.apply(variables, x, bits=bits).argmax(-1)
