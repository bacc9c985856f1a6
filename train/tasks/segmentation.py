"""Segmentation: `train.tasks.images` with label maps, chosen and judged by the mean intersection over union."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from train.config.images import Variant
from train.config.segmentation import SegmentationExperiment
from train.data.load import load_images
from train.data.resident import ImageSet
from train.steps.pixel_losses import make_pixel_entropy, median_frequency_weights
from train.steps.train_step import make_evaluate, make_loss
from train.tasks.images import Training, for_parts, trainings_on


def trainings_of(experiment: SegmentationExperiment, data_dir: Path | None) -> tuple[dict[str, Training], partial]:
    """The trainings by variant and the report of `train.tasks.job.Job`, everything about them checked."""
    images = load_images(experiment.data, data_dir, batch_size=experiment.batch_size)
    return trainings_on(images, experiment, SegmentationTraining)


@dataclasses.dataclass(frozen=True)
class SegmentationTraining(Training):
    """A variant with its data, network, optimizer, start and devices: checked, nothing computed yet."""

    experiment: SegmentationExperiment

    @classmethod
    def create(cls, experiment: Any, variant: Variant, images: ImageSet, mesh: Mesh) -> Any:
        """As `Training.create`.

        Raises:
          ValueError: The network or the optimizer refuses an option, or the step sizes are for maps of another size.
        """
        model, crop = experiment.model_of(variant), experiment.data.crop
        if (model.norm == "spectral" or model.step_size == "auto") and crop not in (None, images.shape[:2]):
            raise ValueError(
                f"data.crop (={crop}) gives other maps than the images of {images.shape[:2]}, and norms of "
                "convolutions depend on the size: leave it out, or take norm='separate'"
            )
        return super().create(experiment, variant, images, mesh)

    @cached_property
    def _loss(self) -> Callable:
        config, weights = self.experiment.loss, None
        if config.class_weights == "median_frequency":
            weights = median_frequency_weights(self.images.stored.train.labels, self.images.num_classes)
        entropy = make_pixel_entropy(config, weights)
        return make_loss(self.model, for_parts(config, self.experiment.accumulate), entropy)

    @cached_property
    def scores(self) -> Callable:
        return make_evaluate(self.model, self.images.normalize, map_classes=self.images.num_classes)

    def _of_classes(self, measured: dict[str, Any]) -> dict[str, Any]:
        means = {key: measured[key] for key in ("mean_iou", "mean_iou_twin") if key in measured}
        of_classes = {key: measured[key] for key in ("iou", "iou_twin") if key in measured}
        classes = self.images.stored.classes
        return means | {key: dict(zip(classes, iou, strict=True)) for key, iou in of_classes.items()}
