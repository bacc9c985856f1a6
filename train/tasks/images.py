"""The main job: train the variants of an experiment and compare each with its high-precision twin."""

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
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
from train.config.images import Experiment, Variant
from train.data.load import load_images
from train.data.resident import ImageSet, make_prepare, make_vary
from train.host.console import Display
from train.host.distributed import is_first
from train.host.mesh import check_divides, local, make_mesh, put, replicated
from train.host.provenance import provenance
from train.loop import Plan, fit
from train.runs.checkpoints import Checkpoints
from train.runs.directory import RunDirectory
from train.runs.warm_start import Start, check_rounding, read_model, read_start
from train.steps import twin_clips
from train.steps.annealing import is_annealed, is_random, make_draw, strength_of, widths_of, with_strength
from train.steps.guards import make_explain
from train.steps.losses import IGNORED, LOSSES
from train.steps.optimizer import create_optimizer
from train.steps.state import RANDOM, TrainState, create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_evaluate, make_loss, make_train_step
from train.tasks.images_summary import check_drawable, write_report

_STATISTICS_BATCHES = 32
"""Training batches over which batch statistics are estimated again at the end."""


def prepare(experiment: Experiment, data_dir: Path | None) -> tuple[dict[str, "Training"], partial]:
    """The trainings by variant and the report of `train.jobs.Job`, everything about them checked."""
    images = load_images(experiment.data, data_dir, batch_size=experiment.batch_size, workers=experiment.workers)
    return prepare_on(images, experiment)


def prepare_on(
    images: ImageSet, experiment: Experiment, kind: "type[Training] | None" = None
) -> tuple[dict[str, "Training"], partial]:
    """`prepare` on images that are there, such as those of another seed's experiment; `kind` of training if another."""
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


def _by_accuracy(line: dict[str, Any]) -> dict[str, float]:
    return {"accuracy": line["validation_accuracy"], "loss": line["validation_loss"]}


@dataclasses.dataclass(frozen=True)
class Training:
    """A variant with its data, network, optimizer, start (None: random) and devices: checked, nothing computed yet.

    Attributes:
      exact: the network without quantizers.
    """

    experiment: Experiment
    variant: Variant
    images: ImageSet
    model: nn.Module
    exact: nn.Module
    optimizer: optax.GradientTransformation
    start: Start | None
    mesh: Mesh

    @classmethod
    def create(cls, experiment: Experiment, variant: Variant, images: ImageSet, mesh: Mesh) -> "Training":
        """Builds the variant and traces its first batch, so that unusable options are found.

        Raises:
          ValueError: the network or the optimizer refuses an option.
        """
        config = experiment.model_of(variant)
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        create = partial(qpde.models.create, options.pop("name"), num_classes=images.num_classes)
        model = create(**options)
        exact = create(**options | {"weight_bits": None, "act_bits": None, "per_channel": False, "clip_bits": None})
        sample = jax.ShapeDtypeStruct((experiment.batch_size, *images.shape), jnp.float32)
        first_variables = partial(_first_variables, model, method=experiment.clip_start)
        shapes = jax.eval_shape(first_variables, jax.random.key(0, impl=RANDOM), sample)
        start = None
        if experiment.start_from is not None:
            run, calibrated = Path(experiment.start_from), experiment.calibration is not None
            check_rounding(read_model(run, variant.name), config, calibrated=calibrated)
            source = exact if calibrated else model
            start = read_start(run, variant.name, jax.eval_shape(source.init, jax.random.key(0), sample))
        _check_loss(experiment, model.bits)
        widths_of(experiment.annealing, model.bits, experiment.epochs)
        strength_of(experiment.annealing.smoothing, smooths=config.smoothing is not None, epochs=experiment.epochs)
        steps = experiment.epochs * (images.count // experiment.batch_size)
        params = twin_clips.add_twin(shapes["params"]) if LOSSES[experiment.loss.name].twin else shapes["params"]
        optimizer = create_optimizer(experiment.optimizer, params, steps=steps)
        return cls(experiment, variant, images, model, exact, optimizer, start, mesh)

    def __call__(self, run: RunDirectory, console: Console) -> dict[str, Any]:
        """Trains, or goes on with training, and evaluates the best state; its results and the history."""
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
                f"{self.variant.name}: training went astray and ended with a network that cannot be measured: {error}. "
                "Try a smaller --optimizer.learning-rate, or a smaller one for the clips (optimizer.rules)"
            ) from error
        if is_first():
            self._keep(run.path / self.variant.name, variables)
        return results | _history(run.lines(self.variant.name), int(state.step))

    def _as_evaluated(self, state: TrainState) -> dict[str, Any]:
        """The variables with the batch statistics of the network's own bits."""
        return reestimate_statistics(self.model, state.averaged.variables, self.statistics_batches(), self.model.bits)

    def _keep(self, folder: Path, variables: dict[str, Any]) -> None:
        """Writes the network where `qpde.load` reads it without data."""
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
            about=about | {"data_fingerprint": self.images.fingerprint} | provenance(),
        )

    def fit(self, run: RunDirectory, console: Console) -> TrainState:
        """Trains, or goes on with training, and returns the state that is best on the validation images."""
        plan = self.plan(traced=is_annealed(self.experiment.annealing))
        with (
            Checkpoints(run.checkpoints(plan.variant)) as checkpoints,
            Display(
                console, plan.title, steps=plan.epochs * plan.steps_per_epoch, done=checkpoints.last_step
            ) as display,
        ):
            return local(fit(self.first_state(), plan, run=run, checkpoints=checkpoints, display=display))

    def plan(self, *, traced: bool, leader: "Training | None" = None) -> Plan:
        """What training is made of.

        Args:
          traced: whether widths are arguments of the compiled programs. If not they are the model's own, constants of
            the programs, which is a little faster.
          leader: a training that differs in name, seed and widths alone, whose images on the device and compiled
            programs are used; None uses its own. With one, widths must be traced.
        """
        experiment, mesh, row = self.experiment, self.mesh, LOSSES[self.experiment.loss.name]
        shared = self if leader is None else leader
        everywhere = partial(put, sharding=replicated(mesh))

        def widths(bits):
            return everywhere(jax.tree.map(np.int32, bits)) if traced else None

        def evaluate(variables, bits):
            if is_random(experiment.annealing):  # the running statistics are a mixture that fits no width
                batches = self.statistics_batches()
                variables = everywhere(reestimate_statistics(shared.model, local(variables), batches, bits))
            return shared._scores(variables, shared._validation, widths(bits))

        return Plan(
            variant=self.variant.name,
            title=self.variant.name if leader is None else f"{experiment.name} {self.variant.name}",
            epochs=experiment.epochs,
            steps_per_epoch=self.images.count // experiment.batch_size,
            checkpoint_every=experiment.checkpoint_every,
            bits=self.widths,
            strength=self.strength,
            enter=self.enter,
            step=lambda state, totals, bits, *data: shared.step(state, totals, widths(bits), *data),
            totals=everywhere(empty_totals(*row.logged)),
            batches=shared._feed,
            evaluate=evaluate,
            score=self.score if row.labels else _by_similarity,
            reached=lambda line: (
                not row.labels and line.get("train_similarity", np.inf) <= experiment.loss.similarity_target
            ),
            explain=lambda state, bits, *data: shared._explain(state, *self.images.select(state, *data), widths(bits)),
            chance=self.images.chance,
        )

    score = staticmethod(_by_accuracy)
    """(line of metrics) -> {"accuracy", "loss"}, by which the best epoch is chosen."""

    @cached_property
    def step(self):
        """(state, totals, bits, *batch) -> (state, totals), compiled; see `train.step.make_epoch_step`."""
        averaging, accumulate = self.experiment.optimizer.averaging, self.experiment.accumulate
        train_step = make_train_step(
            self._loss,
            self.optimizer,
            self._prepare,
            draw=self._draw,
            ranges=self.model.ranges,
            averaging=averaging,
            accumulate=accumulate,
        )
        return make_epoch_step(train_step, self.images.select, mesh=self.mesh)

    @cached_property
    def _explain(self):
        return make_explain(self.model, self._loss, self._prepare, self._draw)

    @cached_property
    def _loss(self):
        return make_loss(self.model, for_parts(self.experiment.loss, self.experiment.accumulate))

    @cached_property
    def _prepare(self):
        return make_prepare(self.experiment.data, self.images)

    @cached_property
    def _draw(self):
        return make_draw(self.experiment.annealing, self.model.bits)

    @cached_property
    def _feed(self):
        return self.images.feed(self.mesh)

    @cached_property
    def _validation(self):
        return self.images.stacks("validation", self.mesh)

    def widths(self, epoch: int) -> Bits:
        """Of an epoch, from 1 on."""
        return widths_of(self.experiment.annealing, self.model.bits, self.experiment.epochs)(epoch)

    def strength(self, epoch: int) -> float | None:
        """Of smoothing in an epoch, from 1 on; None where it is not scheduled."""
        return strength_of(self.experiment.annealing.smoothing, smooths=True, epochs=self.experiment.epochs)(epoch)

    def enter(self, state: TrainState, epoch: int) -> TrainState:
        """The state at other widths or another strength of smoothing; see `train.config.Annealing.reestimate`."""
        state = _at_strength(local(state), self.strength(epoch))
        if self.experiment.annealing.reestimate:
            state = self._reestimated(state, self.widths(epoch))
        return put(state, replicated(self.mesh))

    def evaluate(self, state: TrainState, variables: dict[str, Any]) -> dict[str, Any]:
        """Results on the test images; batch statistics are estimated again, for each precision its own.

        Args:
          state: of the training.   variables: of `_as_evaluated`.
        """
        model, images, state = self.model, self.images, state.averaged
        statistics = list(self.statistics_batches())
        results = {"parameters": qpde.models.summary(model, images.shape).parameters}
        results |= _smoothing_of(model, state.variables)
        if model.bits.activations is None:  # there is nothing to be faithful to
            scores = self._scores(variables, images.stacks("test"))
            return results | {"accuracy": scores["accuracy"]}
        results |= compare(
            model,
            variables,
            self.test_images(),
            model.bits,
            twin=state.twin_variables,
            statistics_batches=statistics,
        ).as_dict()
        if self.experiment.calibration is None:
            return results
        start = reestimate_statistics(self.exact, self.start.variables, statistics, Bits())
        return results | self._beside_start(variables, start)

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
        """The state with the batch statistics of these widths."""
        statistics = self.statistics_batches()
        variables = reestimate_statistics(self.model, state.variables, statistics, bits)
        return state.replace(model_state={name: variables[name] for name in state.model_state})

    def first_state(self) -> TrainState:
        """Random weights or those of another run, and clips that fit them and the first training images."""
        experiment = self.experiment
        init_key, key = jax.random.split(jax.random.key(experiment.seed, impl=RANDOM))
        if self.start is None:
            ((x, _),) = self.training_batches(limit=1)
            options = {"method": experiment.clip_start, "strength": self.strength(1)}
            variables = jax.jit(partial(_first_variables, self.model, **options))(init_key, x)
        else:
            variables = with_strength(self.start.variables, self.strength(1))
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
        """The start's variables; where it was not quantized, with clips and statistics for the widths of the model."""
        if self.experiment.calibration is not None:
            return self._quantized(start)
        untrained = Bits(*(own if was is None else None for own, was in zip(self.model.bits, start.bits, strict=True)))
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
        options = dataclasses.asdict(self.experiment.calibration)
        batches = [x for x, _ in self.training_batches(limit=-(-options.pop("images") // self.experiment.batch_size))]
        options["per_channel"] = self.experiment.model_of(self.variant).per_channel
        return calibration.quantize(self.exact, start.variables, batches, self.model.bits, **options)[1]

    @cached_property
    def _scores(self):
        return make_evaluate(self.model, self.images.normalize)

    def test_images(self):
        """(network input, labels) of the test images, in order."""
        normalize = jax.jit(self.images.normalize)
        return ((normalize(x), jnp.asarray(labels)) for x, labels in self.images.in_order("test"))

    def statistics_batches(self):
        """What batch statistics are estimated from again."""
        return self.training_batches(limit=_STATISTICS_BATCHES)

    def training_batches(self, *, limit: int):
        """The first training batches, varied as in training: statistics of images without the variation are of another
        distribution than the network learned on, and lower its accuracy.
        """
        vary = jax.jit(make_vary(self.experiment.data, self.images))
        for i, (x, labels) in enumerate(self.images.first_batches(limit=limit)):
            key = jax.random.fold_in(jax.random.key(self.experiment.seed, impl=RANDOM), i)
            yield vary(key, jnp.asarray(x)), jnp.asarray(labels, jnp.int32)


def _first_variables(model: nn.Module, key, x, *, method: str, strength: float | None = None) -> dict[str, Any]:
    variables = with_strength(model.init(key, x), strength)
    if model.bits == Bits(None, None):
        return variables
    return qpde.models.calibrate_clips(model, variables, x, method=method, train=True)


def _at_strength(state: TrainState, strength: float | None) -> TrainState:
    """The state at this strength of smoothing. Averages take it at once: one of strengths would lag behind."""
    averages = state.averages
    if averages is not None:
        averages = {**averages, "model_state": with_strength(averages["model_state"], strength)}
    return state.replace(model_state=with_strength(state.model_state, strength), averages=averages)


def _smoothing_of(model: nn.Module, variables: dict[str, Any]) -> dict[str, Any]:
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


def for_parts(loss: Any, accumulate: int) -> Any:
    """The similarity is a sum over images: the average over parts of a batch is that much smaller than the whole."""
    return dataclasses.replace(loss, similarity_weight=accumulate * loss.similarity_weight)


def _by_similarity(line: dict[str, Any]) -> dict[str, float]:
    return {"accuracy": 0.0, "loss": line["train_similarity"]}


def _history(lines: list[dict[str, Any]], best_step: int) -> dict[str, Any]:
    (best,) = [line for line in lines if line["step"] == best_step]
    scores = {name: best[name] for name in ("validation_accuracy", "validation_mean_iou") if name in best}
    found = {"best_epoch": best["epoch"], **scores}
    if lines[-1]["step"] == 0:  # nothing was trained
        return found
    return found | {"training_seconds": round(sum(line["seconds"] for line in lines), 1)}
