"""A trained network whose probabilities another one learns (Hinton et al., 2015)."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

import qpde
from qpde.models.graphs.networks import GraphNetwork
from train.data.resident import ImageSet

Teach = Callable[[Float[Array, "n h w c"], Float[Array, "n classes"]], Float[Array, "n classes"]]


def read_teacher(folder: Path, weight: float, images: ImageSet) -> Teach:
    """Read a teacher: `teach(x, targets) -> (1 - weight) targets + weight softmax(teacher(x))`.

    It sees the images that the training step sees, after every variation, and computes at its own bits with its
    running statistics. Its weights are constants of the compiled step.

    Args:
      folder: Folder of a trained network.
      weight: Share of its probabilities.
      images: The images of the training. They come normalised; the teacher has a normalisation of its own.
    Raises:
      FileNotFoundError: There is no trained network.
      ValueError: It is for other classes, or for images of another size.
    """
    try:
        teacher = qpde.load(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"loss.teacher (={folder}): {error}; give the folder of a trained network, such as RUN/VARIANT"
        ) from None
    if isinstance(teacher.model, GraphNetwork) or teacher.is_segmenting:
        raise ValueError(f"loss.teacher (={folder}) is no classifier of images: give one")
    stored = images.stored
    if tuple(teacher.classes) != tuple(stored.classes):
        raise ValueError(
            f"loss.teacher (={folder}) tells apart {_listed(teacher.classes)}, these images are of "
            f"{_listed(stored.classes)}: give a network that was trained on the same classes"
        )
    if teacher.input_shape is not None and tuple(teacher.input_shape) != tuple(images.shape):
        sizes = ["x".join(map(str, shape)) for shape in (teacher.input_shape, images.shape)]
        raise ValueError(
            f"loss.teacher (={folder}) was trained on images of {sizes[0]}, these are {sizes[1]}: give one of this size"
        )

    mean, std = (np.reshape(v, (1, 1, 1, -1)) for v in (stored.mean, stored.std))

    def teach(x, targets):
        logits = teacher.model.apply(teacher.variables, teacher.normalize(x * std + mean))
        return (1 - weight) * targets + weight * jax.nn.softmax(logits)

    return teach


def _listed(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:4])
    return f"{len(classes)} classes ({shown}{', ...' if len(classes) > 4 else ''})"
