"""Certificates over the test images of a trained network, or over their pixels where it segments."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qpde.bits import Bits
from qpde.certify import Certificate, certify, exact_twin, step_bounds
from qpde.models import converge_norms
from train.data.batches import of_one_shape
from train.trained.finished import Finished, traced

_COMPARED = 1024  # pixels of an image whose bounds are compared with what they bound


@dataclasses.dataclass(frozen=True)
class PartBound:
    """What a part of a segmentation network does to the bounds of its pixels.

    Attributes:
      name: Its name.
      lipschitz: Its constant, in the 2-norm of whole maps.
      share: Share of the bounds that starts at its defect, the mean over pixels and images.
    """

    name: str
    lipschitz: float
    share: float


def measure(finished: Finished, act_bits: int, *, images: int, newton_steps: int | None = None) -> dict[str, Any]:
    """Shares of the first test images, or of their pixels, and the median of bound over measured difference.

    Args:
      finished: A trained network.
      act_bits: Bits of its activations.
      images: How many.
      newton_steps: Steps of Newton's method, see `qpde.certify`.
    Returns:
      "accuracy", "agreement", "certified", "a_priori" and "tightness"; "parts" of a segmentation network, `PartBound`
      by block.
    """
    whole: dict[str, Any] = measure_images(finished, act_bits, images=images, newton_steps=newton_steps)
    ratio, shares = tightness(whole.pop("bound"), whole.pop("error")), whole.pop("shares", None)
    constants = whole.pop("lipschitz", None)
    found = {key: float(values.mean()) for key, values in whole.items()} | {"tightness": ratio}
    if shares is None:
        return found
    shares = shares.mean(0) / max(shares.mean(0).sum(), np.finfo(float).tiny)
    of_parts = zip(finished.model.block_names(), constants, shares, strict=True)
    return found | {"parts": [PartBound(name, float(c), float(share)) for name, c, share in of_parts]}


def tightness(bound: np.ndarray, error: np.ndarray) -> float:
    """The median of bounds over the errors that they bound, of those that are not 0; NaN where all are."""
    found = error > 0
    return float(np.median(bound[found] / error[found])) if found.any() else float("nan")


def _at(finished: Finished, act_bits: int):
    """The network with its variables at these bits, and the bits."""
    model = finished.model
    bits = traced(Bits(model.weight_bits, act_bits))
    variables = finished.at(bits)
    if model.clip_bits is not None:  # else the network stays as it is, for one compiled program at all bits
        model, variables = model.at_bits(variables, Bits(model.weight_bits, act_bits))
    return model, variables, bits


def certified_with_twin(
    model: Any, variables: Any, x: Any, bits: Bits, *, newton_steps: int | None, **given: Any
) -> tuple[Certificate, np.ndarray]:
    """A certificate and the logits of the exact twin, which the cheapest proof has computed already.

    Args:
      model: As for `qpde.certify.certify`.
      variables: As there.
      x: As there.
      bits: As there.
      newton_steps: As there.
      **given: Its other arguments.
    """
    found = certify(model, variables, x, bits, newton_steps=newton_steps, **given)
    return found, np.asarray(found.estimate) if newton_steps is None else exact_twin(model, variables, x, bits)


def certified_maps(
    finished: Finished, act_bits: int, images: Sequence[np.ndarray], *, newton_steps: int | None
) -> list[np.ndarray]:
    """What is known of every pixel: 0 where rounding changes its class, 1 where it provably does not, 2 elsewhere.

    Args:
      finished: A trained segmentation network.
      act_bits: Bits of its activations.
      images: uint8 (H, W, 3), of one size.
      newton_steps: Steps of Newton's method, see `qpde.certify`.
    """
    model, variables, bits = _at(finished, act_bits)
    inputs = [finished.images.normalize(image[None]) for image in images]
    variables = converge_norms(model, variables, inputs[0], bits=bits)
    steps = step_bounds(model, variables, (images[0].shape[0], images[0].shape[1]), bits)
    maps = []
    for x in inputs:
        found, twin = certified_with_twin(model, variables, x, bits, newton_steps=newton_steps, steps=steps)
        same = found.prediction == twin.argmax(-1)
        maps.append(np.where(same, np.where(found.certified, 1, 2), 0)[0])
    return maps


def measure_images(
    finished: Finished, act_bits: int, *, images: int, newton_steps: int | None = None
) -> dict[str, np.ndarray]:
    """What `measure` sums up: "accuracy", "agreement", "certified" and "a_priori" for each of the images, or of the
    pixels that have a class, "error" and "bound" of every logit difference from the predicted class, at some pixels
    where there are many; and of a segmentation network "shares" and "lipschitz", see `qpde.certify.Certificate`.
    """
    model, variables, bits = _at(finished, act_bits)
    parts: list[dict[str, Any]] = []
    for x, own in of_one_shape(finished.test_images(images)):
        count = len(own)
        if not parts:
            variables = converge_norms(model, variables, x[:1], bits=bits)
            steps = step_bounds(model, variables, (x.shape[1], x.shape[2]), bits)
        found, twin = certified_with_twin(model, variables, x, bits, newton_steps=newton_steps, steps=steps)
        chosen, difference = found.prediction[..., None], found.logits - twin
        error = np.abs(np.take_along_axis(difference, chosen, axis=-1) - difference)
        others = np.arange(twin.shape[-1]) != chosen
        counted = np.asarray(own) >= 0
        error, bound, others = (v[:count][counted] for v in (error, np.asarray(found.bound), others))
        every = max(1, len(error) // (_COMPARED * count))
        part = {
            "accuracy": (found.prediction[:count] == own)[counted],
            "agreement": (found.prediction == twin.argmax(-1))[:count][counted],
            "certified": np.asarray(found.certified)[:count][counted],
            "a_priori": np.asarray(found.certified_a_priori)[:count][counted],
            "error": error[::every][others[::every]],
            "bound": bound[::every][others[::every]],
        }
        parts.append(part if found.shares is None else part | {"shares": found.shares[:count]})
    whole = {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}
    return whole if found.shares is None else whole | {"lipschitz": np.asarray(found.lipschitz)}
