"""Certificates over the test images of a trained network."""

from typing import Any

import numpy as np

from qpde.bits import Bits
from qpde.certify import certify, exact_twin, step_bounds
from qpde.models import converge_norms
from train.data.batches import of_one_shape
from train.trained.finished import Finished, traced


def measure(finished: Finished, act_bits: int, *, images: int, newton_steps: int = 2) -> dict[str, float]:
    """Shares of the first test images, and the median of bound over measured difference.

    Args:
      finished: A trained network.
      act_bits: Bits of its activations.
      images: How many.
      newton_steps: Steps of Newton's method, see `qpde.certify`.
    Returns:
      "accuracy", "agreement", "certified", "a_priori" and "tightness".
    """
    whole = measure_images(finished, act_bits, images=images, newton_steps=newton_steps)
    ratio = tightness(whole.pop("bound"), whole.pop("error"))
    return {key: float(values.mean()) for key, values in whole.items()} | {"tightness": ratio}


def tightness(bound: np.ndarray, error: np.ndarray) -> float:
    """The median of bounds over the errors that they bound, of those that are not 0; NaN where all are."""
    found = error > 0
    return float(np.median(bound[found] / error[found])) if found.any() else float("nan")


def measure_images(finished: Finished, act_bits: int, *, images: int, newton_steps: int = 2) -> dict[str, np.ndarray]:
    """What `measure` sums up: "accuracy", "agreement", "certified" and "a_priori" for each of the images, "error" and
    "bound" of every logit difference from the predicted class.
    """
    model = finished.model
    bits = traced(Bits(model.weight_bits, act_bits))
    variables = finished.at(bits)
    if model.clip_bits is not None:  # else the network stays as it is, for one compiled program at all bits
        model, variables = model.at_bits(variables, Bits(model.weight_bits, act_bits))
    parts: list[dict[str, Any]] = []
    for x, own in of_one_shape(finished.test_images(images)):
        count = len(own)
        if not parts:
            variables = converge_norms(model, variables, x[:1], bits=bits)
            steps = step_bounds(model, variables, (x.shape[1], x.shape[2]), bits)
        found = certify(model, variables, x, bits, newton_steps=newton_steps, steps=steps)
        twin = exact_twin(model, variables, x, bits)
        chosen, difference = found.prediction[:, None], found.logits - twin
        error = np.abs(np.take_along_axis(difference, chosen, axis=1) - difference)
        others = np.arange(twin.shape[1])[None] != chosen
        parts.append(
            {
                "accuracy": found.prediction[:count] == own,
                "agreement": (found.prediction == twin.argmax(-1))[:count],
                "certified": found.certified[:count],
                "a_priori": found.certified_a_priori[:count],
                "error": error[:count][others[:count]],
                "bound": found.bound[:count][others[:count]],
            }
        )
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}
