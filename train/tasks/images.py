"""The main job: train the variants of an experiment and compare each with its high-precision twin."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

import qpde
import qpde.models
from qpde.bits import Bits
from qpde.measure.faithfulness import compare, reestimate_statistics
from qpde.ptq import calibration
from train.config.images import Experiment, Loss, Variant
from train.data.batches import STATISTICS_BATCHES, in_network_form, training_batches
from train.data.load import load_images
from train.data.resident import ImageSet, make_inputs, make_vary
from train.data.teacher import Teach, read_teacher
from train.host.console import Display
from train.host.distributed import is_first
from train.host.mesh import check_divides, local, make_mesh, put, replicated
from train.host.provenance import provenance
from train.loop import Scores, fit
from train.runs.checkpoints import Checkpoints
from train.runs.directory import RunDirectory
from train.runs.warm_start import Start, cause_of_breakdown, read_start
from train.steps import twin_clips
from train.steps.annealing import bits_of, is_annealed, make_draw, smoothing_scale_of, with_smoothing_scale
from train.steps.guards import make_explain
from train.steps.losses import IGNORED, LOSSES
from train.steps.optimizer import create_optimizer
from train.steps.state import RANDOM, TrainState, create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_evaluate, make_loss, make_train_step
from train.tasks.images_summary import check_drawable, write_report

_VALIDATION_STATISTICS = 4
"""Training batches over which batch statistics are estimated again before an epoch is validated."""


def trainings_of(experiment: Experiment, data_dir: Path | None) -> tuple[dict[str, "Training"], partial]:
    """The trainings by variant and the report of `train.tasks.job.Job`, everything about them checked."""
    images = load_images(experiment.data, data_dir, batch_size=experiment.batch_size, workers=experiment.workers)
    return trainings_on(images, experiment)


def trainings_on(
    images: ImageSet, experiment: Experiment, kind: "type[Training] | None" = None
) -> tuple[dict[str, "Training"], partial]:
    """`trainings_of` on images that are there, such as those of another seed's experiment.

    Args:
      images: The images.
      experiment: Their experiment.
      kind: Class of its trainings. Default: `Training`.
    """
    if images.count < experiment.batch_size:
        raise ValueError(
            f"batch_size (={experiment.batch_size}) exceeds the {images.count} training images: choose less"
        )
    check_drawable(experiment.chosen)
    mesh = make_mesh(experiment.devices)
    check_divides(experiment.batch_size, mesh, experiment.accumulate)
    create = (kind or Training).create
    trainings = {variant.name: create(experiment, variant, images, mesh) for variant in experiment.chosen}
    stages = [len(blocks) for blocks in trainings[experiment.chosen[0].name].model.stages]
    return trainings, partial(write_report, experiment, stages)


@dataclasses.dataclass(frozen=True)
class Training:
    """A variant with its data, network, optimizer, start (None: random) and devices: checked, nothing computed yet.

    Attributes:
      exact: the network without quantizers.
      first_variables: (key, a batch) -> random variables whose clips fit the batch; compiled, and traced once.
      teach: (x, targets) -> targets with a teacher's probabilities, or None.
    """

    experiment: Experiment
    variant: Variant
    images: ImageSet
    model: Any
    exact: Any
    first_variables: Callable
    optimizer: optax.GradientTransformation
    start: Start | None
    mesh: Mesh
    teach: Teach | None = None

    @classmethod
    def create(cls, experiment: Experiment, variant: Variant, images: ImageSet, mesh: Mesh) -> "Training":
        """Build the variant and trace its first batch, so that unusable options are found.

        Raises:
          ValueError: the network or the optimizer refuses an option.
        """
        config = experiment.model_of(variant)
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        create = partial(qpde.models.create, options.pop("name"), num_classes=images.num_classes)
        model = create(**options)
        exact = create(**options | {"weight_bits": None, "act_bits": None, "per_channel": False, "clip_bits": None})
        smoothing_scale = smoothing_scale_of(
            experiment.annealing.smoothing, smooths=config.smoothing is not None, epochs=experiment.epochs
        )(1)
        sample = jax.ShapeDtypeStruct((experiment.batch_size, *images.shape), jnp.float32)
        first = partial(_first_variables, model, smoothing_scale=smoothing_scale, method=experiment.clip_start)
        first_variables = jax.jit(first)
        shapes = jax.eval_shape(first_variables, jax.random.key(0, impl=RANDOM), sample)
        start = None
        if experiment.start_from is not None:
            calibrated = experiment.calibration is not None
            source = exact if calibrated else model
            needed = jax.eval_shape(source.init, jax.random.key(0), sample)
            start = read_start(Path(experiment.start_from), variant.name, config, needed, calibrated=calibrated)
        _check_loss(experiment, model.bits)
        bits_of(experiment.annealing, model.bits, experiment.epochs)
        steps = experiment.epochs * (images.count // experiment.batch_size)
        params = twin_clips.add_twin(shapes["params"]) if LOSSES[experiment.loss.name].twin else shapes["params"]
        optimizer = create_optimizer(experiment.optimizer, params, steps=steps)
        loss, teach = experiment.loss, None
        if loss.teacher is not None:
            teach = read_teacher(Path(loss.teacher), loss.teacher_weight, images)
        return cls(experiment, variant, images, model, exact, first_variables, optimizer, start, mesh, teach)

    @property
    def fingerprint(self) -> str:
        """Digest that tells the data from any other."""
        return self.images.fingerprint

    def __call__(self, run: RunDirectory, console: Console) -> dict[str, Any]:
        """Train, or go on with training, and evaluate the best state; its results and the history."""
        return self.results(self.fit(run, console), run)

    def results(self, state: TrainState, run: RunDirectory) -> dict[str, Any]:
        """`evaluate` and the history of a training that ended with this state.

        Raises:
          FloatingPointError: the trained network has activations that are not finite.
        """
        try:
            variables = self._as_evaluated(state)
            results = self.evaluate(state, variables)
        except ValueError as error:
            raise FloatingPointError(
                f"{self.variant.name}: training diverged: the trained network cannot be evaluated: {error}. "
                "Try a smaller --optimizer.learning-rate, or a smaller one for the clips (optimizer.rules)"
            ) from error
        if is_first():
            self._keep(run.path / self.variant.name, variables)
        return results | _history(run.lines(self.variant.name), int(state.step))

    def _as_evaluated(self, state: TrainState) -> dict[str, Any]:
        """The variables with the batch statistics of the network's own bits."""
        return reestimate_statistics(self.model, state.averaged.variables, self.statistics_batches(), self.model.bits)

    def _keep(self, folder: Path, variables: dict[str, Any]) -> None:
        """Write the network where `qpde.load` reads it without data."""
        stored = self.images.stored
        about = {"variant": self.variant.name, "seed": self.experiment.seed, "data": self.experiment.data.name}
        qpde.save(
            folder,
            self.model,
            variables,
            classes=stored.classes,
            input_shape=self.images.shape,
            mean=stored.mean,
            std=stored.std,
            centre=stored.centre,
            about=about | {"data_fingerprint": self.fingerprint} | provenance(),
        )

    def fit(self, run: RunDirectory, console: Console) -> TrainState:
        """Train, or go on with training, and return the state that is best on the validation images."""
        plan = ImagePlan(self, traced=is_annealed(self.experiment.annealing))
        with (
            Checkpoints(run.checkpoints(plan.variant)) as checkpoints,
            Display(
                console, plan.title, steps=plan.epochs * plan.steps_per_epoch, done=checkpoints.last_step
            ) as display,
        ):
            return local(fit(self.first_state(), plan, run=run, checkpoints=checkpoints, display=display))

    @cached_property
    def step(self):
        """(state, totals, bits, *batch) -> (state, totals), compiled; see `train.steps.train_step.make_epoch_step`."""
        averaging, accumulate = self.experiment.optimizer.averaging, self.experiment.accumulate
        train_step = make_train_step(
            self._loss,
            self.optimizer,
            self._inputs,
            draw=self._draw,
            ranges=self.model.ranges,
            averaging=averaging,
            accumulate=accumulate,
        )
        return make_epoch_step(train_step, self.images.select, mesh=self.mesh)

    @cached_property
    def explain(self):
        """(state, images and labels, bits) -> what breaks down in the step; see `train.steps.guards.make_explain`."""
        return make_explain(self.model, self._loss, self._inputs, self._draw)

    @cached_property
    def _loss(self):
        return make_loss(self.model, for_parts(self.experiment.loss, self.experiment.accumulate))

    @cached_property
    def _inputs(self):
        return make_inputs(self.experiment.data, self.images, self.teach)

    @cached_property
    def _vary(self):
        return jax.jit(make_vary(self.experiment.data, self.images))

    @cached_property
    def _draw(self):
        return make_draw(self.experiment.annealing, self.model.bits)

    @cached_property
    def feed(self):
        """`batches(state)` of the images, see `train.data.resident.ImageSet`."""
        return self.images.feed(self.mesh)

    @cached_property
    def validation(self):
        """The validation images, stacked on the devices."""
        return self.images.stacks("validation", self.mesh)

    def bits(self, epoch: int) -> Bits:
        """Bits of an epoch, from 1 on."""
        return bits_of(self.experiment.annealing, self.model.bits, self.experiment.epochs)(epoch)

    def smoothing_scale(self, epoch: int) -> float | None:
        """Share of the full smoothing in an epoch, from 1 on; None where it is not scheduled."""
        return smoothing_scale_of(self.experiment.annealing.smoothing, smooths=True, epochs=self.experiment.epochs)(
            epoch
        )

    def enter(self, state: TrainState, epoch: int) -> TrainState:
        """The state at other bits or another smoothing scale; see `train.config.Annealing.reestimate`."""
        state = _at_smoothing_scale(local(state), self.smoothing_scale(epoch))
        if self.experiment.annealing.reestimate:
            state = self._reestimated(state, self.bits(epoch))
        return put(state, replicated(self.mesh))

    def evaluate(self, state: TrainState, variables: dict[str, Any]) -> dict[str, Any]:
        """Results on the test images; batch statistics are estimated again, for each precision its own.

        Args:
          state: Last state of the training.
          variables: Result of `_as_evaluated`.
        """
        model, images, state = self.model, self.images, state.averaged
        statistics = list(self.statistics_batches())
        results = {"parameters": qpde.models.summary(model, images.shape).parameters}
        results |= _smoothing_of(model, state.variables)
        if model.bits.activations is None:  # there is nothing to be faithful to
            scores = self.scores(variables, images.stacks("test"))
            return results | {"accuracy": scores["accuracy"]} | self._of_classes(scores)
        twin = variables if state.twin_variables is None else state.twin_variables
        twin = reestimate_statistics(model, twin, statistics, model.bits.twin)
        measured = compare(model, variables, self.test_images(), model.bits, twin=twin).as_dict()
        results |= measured | self._of_classes(measured)
        if self.experiment.calibration is None or self.start is None:
            return results
        start = reestimate_statistics(self.exact, self.start.variables, statistics, Bits())
        return results | self._beside_start(variables, start)

    def _of_classes(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Results on the test images by the names of classes: of networks with a class for every pixel."""
        return {}

    def _beside_start(self, variables: dict[str, Any], start: dict[str, Any]) -> dict[str, float]:
        """What post-training quantization changed: the start's accuracy, and on how many test images both agree."""

        @jax.jit
        def predictions(x):
            low, full = self.model.apply(variables, x), self.exact.apply(start, x)
            return low.argmax(-1), full.argmax(-1)

        agree, right, count = 0, 0, 0
        for x, labels in self.test_images():
            low, full = predictions(x)
            counts = labels != IGNORED
            agree += int(((low == full) & counts).sum())
            right += int(((full == labels) & counts).sum())
            count += int(counts.sum())
        return {"accuracy_start": right / count, "agreement_start": agree / count}

    def _reestimated(self, state: TrainState, bits: Bits) -> TrainState:
        """The state with the batch statistics of these bits."""
        statistics = self.statistics_batches()
        variables = reestimate_statistics(self.model, state.variables, statistics, bits)
        return state.replace(model_state={name: variables[name] for name in state.model_state})

    def first_state(self) -> TrainState:
        """Random weights or those of another run, and clips that fit them and the first training images."""
        experiment = self.experiment
        init_key, key = jax.random.split(jax.random.key(experiment.seed, impl=RANDOM))
        if self.start is None:
            ((x, _),) = self.training_batches(limit=1)
            variables = self.first_variables(init_key, x)
        else:
            variables = with_smoothing_scale(self.start.variables, self.smoothing_scale(1))
            variables = self._started(dataclasses.replace(self.start, variables=variables))
        params = variables["params"]
        if not LOSSES[experiment.loss.name].twin:
            params = twin_clips.low(params)
        elif not twin_clips.has_twin(params):
            params = twin_clips.add_twin(params)
        averaging = experiment.optimizer.averaging > 0
        state = create_state({**variables, "params": params}, self.optimizer, key, averaging=averaging)
        return put(state, replicated(self.mesh))

    def _started(self, start: Start) -> dict[str, Any]:
        """The start's variables; where clips are missing or to be reset, with new ones, and statistics to fit them."""
        if self.experiment.calibration is not None:
            return self._quantized(start)
        known = Bits(None, None) if self.experiment.reset_clips else start.bits
        untrained = Bits(*(own if was is None else None for own, was in zip(self.model.bits, known, strict=True)))
        if untrained == Bits(None, None):
            return start.variables
        ((x, _),) = self.training_batches(limit=1)
        variables = {**start.variables, "params": twin_clips.low(start.variables["params"])}
        variables = qpde.models.calibrate_clips(
            self.model, variables, x, method=self.experiment.clip_start, bits=untrained
        )
        statistics = self.statistics_batches()
        return reestimate_statistics(self.model, variables, statistics, self.model.bits)

    def _quantized(self, start: Start) -> dict[str, Any]:
        """The full-precision start's variables, quantized after training."""
        assert self.experiment.calibration is not None, "asked for by the caller"
        options = dataclasses.asdict(self.experiment.calibration)
        batches = [x for x, _ in self.training_batches(limit=-(-options.pop("images") // self.experiment.batch_size))]
        options["per_channel"] = self.experiment.model_of(self.variant).per_channel
        return calibration.quantize(self.exact, start.variables, batches, self.model.bits, **options)[1]

    @cached_property
    def scores(self):
        """(variables, stacked images, bits) -> accuracy and loss, compiled."""
        return make_evaluate(self.model, self.images.normalize)

    def test_images(self):
        """(network input, labels) of the test images, in order."""
        return in_network_form(self.images)

    def statistics_batches(self, *, limit: int = STATISTICS_BATCHES):
        """What batch statistics are estimated from again."""
        return self.training_batches(limit=limit)

    def training_batches(self, *, limit: int):
        """The first training batches, varied as in training."""
        return training_batches(self.images, self._vary, seed=self.experiment.seed, limit=limit)


@dataclasses.dataclass(frozen=True)
class ImagePlan:
    """A `train.loop.Plan` of an image training.

    Attributes:
      training: What is trained.
      traced: Whether bits are arguments of the compiled programs. If not they are the model's own, constants of the
        programs, which is a little faster.
      leader: A training that differs in name, seed and bits alone, whose images on the device and compiled programs
        are used. None uses the training's own. With one, bits must be traced.
    """

    training: Training
    traced: bool
    leader: Training | None = None

    @property
    def variant(self) -> str:
        return self.training.variant.name

    @property
    def title(self) -> str:
        return self.variant if self.leader is None else f"{self.training.experiment.name} {self.variant}"

    @property
    def epochs(self) -> int:
        return self.training.experiment.epochs

    @property
    def steps_per_epoch(self) -> int:
        return self.training.images.count // self.training.experiment.batch_size

    @property
    def checkpoint_every(self) -> int:
        return self.training.experiment.checkpoint_every

    @cached_property
    def totals(self) -> Any:
        return put(empty_totals(*self._loss.logged), replicated(self.training.mesh))

    @property
    def chance(self) -> float:
        return self.training.images.chance

    def bits(self, epoch: int) -> Bits:
        return self.training.bits(epoch)

    def smoothing_scale(self, epoch: int) -> float | None:
        return self.training.smoothing_scale(epoch)

    def enter(self, state: TrainState, epoch: int) -> TrainState:
        return self.training.enter(state, epoch)

    def batches(self, state: TrainState) -> Iterable[tuple]:
        return self._shared.feed(state)

    def step(self, state: TrainState, totals: Any, bits: Bits, *batch: Any) -> tuple[TrainState, Any]:
        return self._shared.step(state, totals, self._on_devices(bits), *batch)

    def evaluate(self, variables: dict[str, Any], bits: Bits) -> Scores:
        """Accuracy and loss on the validation images, with batch statistics as the final evaluation estimates them."""
        batches = self.training.statistics_batches(limit=_VALIDATION_STATISTICS)
        variables = reestimate_statistics(self._shared.model, local(variables), batches, bits)
        variables = put(variables, replicated(self.training.mesh))
        return self._shared.scores(variables, self._shared.validation, self._on_devices(bits))

    def score(self, line: dict[str, Any]) -> Scores:
        if self._loss.labels or "train_similarity" not in line:  # nothing was trained
            best_of = line.get("validation_mean_iou", line["validation_accuracy"])
            return {"accuracy": best_of, "loss": line["validation_loss"]}
        return {"accuracy": 0.0, "loss": line["train_similarity"]}

    def reached(self, line: dict[str, Any]) -> bool:
        target = self.training.experiment.loss.similarity_target
        return not self._loss.labels and line.get("train_similarity", np.inf) <= target

    def explain(self, state: TrainState, bits: Bits, *batch: Any) -> str:
        chosen = self.training.images.select(state, *batch)
        why = self._shared.explain(state, *chosen, self._on_devices(bits))
        return why + cause_of_breakdown(self.training.start, self.training.model.options)

    @property
    def _shared(self) -> Training:
        return self.leader or self.training

    @property
    def _loss(self) -> Any:
        return LOSSES[self.training.experiment.loss.name]

    def _on_devices(self, bits: Bits) -> Bits | None:
        """The bits as an argument of the compiled programs, or None for those of the model."""
        return put(jax.tree.map(np.int32, bits), replicated(self.training.mesh)) if self.traced else None


def _first_variables(model: Any, key, x, *, method: str, smoothing_scale: float | None = None) -> dict[str, Any]:
    variables = with_smoothing_scale(model.init(key, x), smoothing_scale)
    if model.bits == Bits(None, None):
        return variables
    return qpde.models.calibrate_clips(model, variables, x, method=method, train=True)


def _at_smoothing_scale(state: TrainState, smoothing_scale: float | None) -> TrainState:
    """The state at this smoothing scale. Averages take it at once: an average of scales would lag behind."""
    averages = state.averages
    if averages is not None:
        averages = {**averages, "model_state": with_smoothing_scale(averages["model_state"], smoothing_scale)}
    return state.replace(model_state=with_smoothing_scale(state.model_state, smoothing_scale), averages=averages)


def _smoothing_of(model: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """The learned or scheduled gamma2 by block, None where a block does not smooth, and the mean of the others."""
    if all(block.smoothing is None for block in model.blocks):
        return {}
    found = [gamma2 for *_, gamma2 in model.steps(variables)]
    if not any(isinstance(gamma2, jax.Array) for gamma2 in found):
        return {}
    values = [None if gamma2 is None else float(gamma2) for gamma2 in found]
    return {"gamma2": values, "mean_gamma2": float(np.mean([value for value in values if value is not None]))}


def _check_loss(experiment: Experiment, bits: Bits) -> None:
    name = experiment.loss.name
    if LOSSES[name].twin and bits.activations is None:
        raise ValueError(f"loss.name (={name!r}) compares with the high-precision twin: give the model act_bits")
    if not LOSSES[name].labels and experiment.start_from is None:
        raise ValueError(f"loss.name (={name!r}) tunes a trained network: give --start-from RUN")


def for_parts(loss: Loss, accumulate: int) -> Any:
    """The similarity is a sum over images: the average over parts of a batch is that much smaller than the whole."""
    return dataclasses.replace(loss, similarity_weight=accumulate * loss.similarity_weight)


def _history(lines: list[dict[str, Any]], best_step: int) -> dict[str, Any]:
    (best,) = [line for line in lines if line["step"] == best_step]
    scores: dict[str, Any] = {
        name: best[name] for name in ("validation_accuracy", "validation_mean_iou") if name in best
    }
    found: dict[str, Any] = {"best_epoch": best["epoch"], **scores}
    if lines[-1]["step"] == 0:  # nothing was trained
        return found
    return found | {"training_seconds": round(sum(line["seconds"] for line in lines), 1)}
