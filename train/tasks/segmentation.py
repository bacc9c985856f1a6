"""Segmentation: `train.tasks.images` with label maps, chosen and judged by the mean intersection over union."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qpde.measure.faithfulness import reestimate_statistics
from train.config.images import Variant
from train.config.segmentation import SegmentationExperiment
from train.data.maps import Maps, load_maps, make_prepare_maps
from train.steps.pixel_losses import make_pixel_entropy
from train.steps.state import RANDOM, TrainState
from train.steps.train_step import make_evaluate, make_loss
from train.tasks.images import Training, for_parts, prepare_on


def prepare(experiment: SegmentationExperiment, data_dir: Path | None) -> tuple[dict[str, Training], partial]:
    """The trainings by variant and the report of `train.tasks.job.Job`, everything about them checked."""
    images = load_maps(experiment.data, data_dir, batch_size=experiment.batch_size)
    return prepare_on(images, experiment, SegmentationTraining)


def _by_iou(line: dict[str, Any]) -> dict[str, float]:
    return {"accuracy": line["validation_mean_iou"], "loss": line["validation_loss"]}


@dataclasses.dataclass(frozen=True)
class SegmentationTraining(Training):
    """A variant with its data, network, optimizer, start and devices: checked, nothing computed yet."""

    experiment: SegmentationExperiment
    images: Maps

    score = staticmethod(_by_iou)

    @classmethod
    def create(
        cls, experiment: SegmentationExperiment, variant: Variant, images: Maps, mesh: Mesh
    ) -> "SegmentationTraining":
        """As `Training.create`.

        Raises:
          ValueError: The network or the optimizer refuses an option, or the step sizes are for maps of another size.
        """
        model = experiment.model_of(variant)
        if (model.norm == "spectral" or model.step_size == "auto") and images.training_shape != images.shape:
            raise ValueError(
                f"data.crop (={experiment.data.crop}) gives other maps than the images of {images.shape[:2]}, and "
                "norms of convolutions depend on the size: leave it out, or take norm='separate'"
            )
        return super().create(experiment, variant, images, mesh)

    @cached_property
    def _loss(self) -> Callable:
        config = self.experiment.loss
        weights = self.images.weights if config.class_weights == "median_frequency" else None
        return make_loss(self.model, for_parts(config, self.experiment.accumulate), make_pixel_entropy(config, weights))

    @cached_property
    def _prepare(self) -> Callable:
        return make_prepare_maps(self.images)

    @cached_property
    def _scores(self) -> Callable:
        return make_evaluate(self.model, self.images.normalize, map_classes=self.images.num_classes)

    def training_batches(self, *, limit: int):
        """The first training batches, varied as in training, with their label maps."""
        vary = jax.jit(self.images.vary)
        for i, (x, labels) in enumerate(self.images.first_batches(limit=limit)):
            key = jax.random.fold_in(jax.random.key(self.experiment.seed, impl=RANDOM), i)
            yield vary(key, jnp.asarray(x), jnp.asarray(labels))

    def evaluate(self, state: TrainState, variables: dict[str, Any]) -> dict[str, Any]:
        """As `Training.evaluate`, with the intersection over union of the network and of its twin."""
        results = super().evaluate(state, variables)
        results |= self._named(self._scores(variables, self.images.stacks("test")))
        bits = self.model.bits
        if bits.activations is not None:
            twin = reestimate_statistics(
                self.model, state.averaged.twin_variables, self.statistics_batches(), bits.twin
            )
            found = self._named(self._scores(twin, self.images.stacks("test"), bits.twin))
            results |= {f"{name}_twin": value for name, value in found.items()}
        return results

    def _named(self, scores: dict[str, Any]) -> dict[str, Any]:
        iou = dict(zip(self.images.stored.classes, scores["iou"], strict=True))
        return {"mean_iou": scores["mean_iou"], "iou": iou}
