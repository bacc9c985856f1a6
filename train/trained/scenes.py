"""What a page shows of a trained segmentation network beyond its run's summary.json."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

import qpde.models
from qpde.measure.faithfulness import Faithfulness
from qpde.overlays import overlay
from train.trained.figures import faithfulness_by_bits
from train.trained.finished import Finished

COLUMNS = ("truth", "network", "its twin", "where they differ")
"""What is shown of a scene."""

_SCENES = 3


@dataclasses.dataclass(frozen=True)
class MeasuredScenes:
    """All of it.

    Attributes:
      cost: Result of `qpde.models.summary`.
      about: Where the network came from.
      by_bits: Faithfulness by bits of the activations; empty where they are not quantized.
      scenes: Some test images by name, as `COLUMNS` show them, uint8 (H, W, 3).
    """

    cost: qpde.models.Summary
    about: dict[str, Any]
    by_bits: dict[int, Faithfulness]
    scenes: dict[str, list[np.ndarray]]


def measure_scenes(finished: Finished, *, act_bits: tuple[int, ...], images: int) -> MeasuredScenes:
    """Measure one segmentation network.

    Args:
      finished: The network.
      act_bits: Bits of activations to run it at.
      images: Test images to use, the first ones.
    """
    model = finished.model
    return MeasuredScenes(
        cost=qpde.models.summary(model, finished.images.shape),
        about=finished.network.about,
        by_bits={} if model.bits.activations is None else faithfulness_by_bits(finished, act_bits, images),
        scenes=_scenes(finished, images),
    )


def _scenes(finished: Finished, images: int) -> dict[str, list[np.ndarray]]:
    model, found = finished.model, {}
    count = model.num_classes
    at = [(bits, finished.at(bits)) for bits in (model.bits, model.bits.twin)]
    stored = next(iter(finished.images.in_order("test")))
    places = np.linspace(0, min(images, len(stored.images)) - 1, _SCENES).astype(int)
    for i, place in enumerate(dict.fromkeys(places.tolist()), start=1):
        image, truth = stored.images[place], stored.labels[place]
        x = finished.images.normalize(image[None])
        low, twin = (np.asarray(_classes(model, variables, x, bits))[0] for bits, variables in at)
        shown = [overlay(image, labels, count) for labels in (truth, low, twin)]
        found[f"image {i}"] = [*shown, overlay(image // 2, np.where(low == twin, -1, low), count, share=1.0)]
    return found


@partial(jax.jit, static_argnames=("model", "bits"))
def _classes(model, variables, x, bits):
    return model.apply(variables, x, bits=bits).argmax(-1)
