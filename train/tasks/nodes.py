"""The job on a graph: train the variants in full precision, quantize them, and compare each with itself."""

import dataclasses
import inspect
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import qpde
import qpde.models
from qpde.bits import Bits
from qpde.measure.faithfulness import compare
from train.config.graphs import GraphExperiment, GraphVariant
from train.data.fingerprint import fingerprint_of
from train.host.console import Display
from train.host.interrupt import Interrupted, StopRequest
from train.host.provenance import provenance
from train.runs.checkpoints import Checkpoints
from train.runs.directory import RunDirectory
from train.steps.optimizer import create_optimizer
from train.steps.paths import path_name
from train.steps.state import RANDOM
from train.tasks.nodes_data import check_same_graph, load_graph, make_task
from train.tasks.nodes_step import NodeState, Task, calibrate_seeds, init_seeds, start_seeds, test_seeds, train_seeds
from train.tasks.nodes_summary import FULL, check_pictures, name_of, write_report

_EXACT = Bits(None, None)


def trainings_of(experiment: GraphExperiment, data_dir: Path | None) -> tuple[dict[str, "Training"], partial]:
    """The trainings by variant and the report of `train.tasks.job.Job`, everything about them checked."""
    check_pictures(experiment)
    graph = load_graph(experiment.data, data_dir)
    task = make_task(graph)
    trainings = {
        variant.name: Training.create(experiment, variant, task, num_classes=graph.num_classes, classes=graph.classes)
        for variant in experiment.chosen
    }
    return trainings, partial(write_report, experiment)


@dataclasses.dataclass(frozen=True)
class Training:
    """A variant with its graph, network and optimizers: checked, nothing computed yet."""

    experiment: GraphExperiment
    variant: GraphVariant
    task: Task
    classes: tuple[str, ...] | None
    model: Any
    optimizer: optax.GradientTransformation
    tuner: optax.GradientTransformation

    @classmethod
    def create(
        cls,
        experiment: GraphExperiment,
        variant: GraphVariant,
        task: Task,
        *,
        num_classes: int,
        classes: tuple[str, ...] | None = None,
    ) -> "Training":
        """Build the variant and trace it, so that unusable options are found.

        Raises:
          ValueError: the network or the optimizer refuses an option.
        """
        config = experiment.model_of(variant)
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        builder = getattr(qpde.models, options.pop("name"))
        known = inspect.signature(builder).parameters
        model = builder(num_classes=num_classes, **{k: v for k, v in options.items() if k in known})
        shapes = jax.eval_shape(model.init, jax.random.key(0, impl=RANDOM), task.graph)["params"]
        adam = experiment.optimizer_of(variant)
        slower = dataclasses.replace(adam, learning_rate=adam.learning_rate * experiment.tune_learning_rate)
        optimizer, tuner = (create_optimizer(config, shapes, steps=experiment.epochs) for config in (adam, slower))
        return cls(experiment, variant, task, classes, model, optimizer, tuner)

    def __call__(self, run: RunDirectory, console: Console) -> dict[str, Any]:
        """Train every seed in full precision and at each pair of bits; results by part, lists over seeds."""
        experiment, model, task = self.experiment, self.model, self.task
        check_same_graph(run, self.fingerprint)
        seeds = jnp.asarray(np.arange(experiment.seed, experiment.seed + experiment.seeds).astype(np.uint32))
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed, impl=RANDOM)))(seeds)
        init_keys, keys = keys[:, 0], keys[:, 1]
        params = init_seeds(model, init_keys, task, _EXACT, methods=_EXACT, at_once=self.at_once)
        full = self._fit(FULL, params, keys, _EXACT, run, console)
        accuracy, energy = jax.device_get(test_seeds(model, full.best_params, task, at_once=self.at_once))
        results: dict[str, Any] = {"parameters": _count(params)}
        self._keep(run.path / self.variant.name / FULL, full, _EXACT)
        results[FULL] = {"accuracy": accuracy.tolist(), "energy": energy.tolist()} | _best_epoch(full)
        for pair in experiment.bits:
            part, bits = name_of(pair), Bits(*map(jnp.float32, pair))
            clips = {"methods": Bits(*map(_clip_method, pair)), "at_once": self.at_once}
            if experiment.start == "random":
                params = init_seeds(model, init_keys, task, bits, **clips)
            else:
                params = calibrate_seeds(model, full.best_params, task, bits, **clips)
                before = self._compare(params, bits)
            state = self._fit(part, params, keys, bits, run, console)
            self._keep(run.path / self.variant.name / part, state, Bits(*pair))
            results[part] = self._compare(state.best_params, bits) | _best_epoch(state)
            if experiment.start == "trained":
                results[part]["untuned"] = {key: before[key] for key in ("accuracy", "agreement")}
        return results

    @cached_property
    def fingerprint(self) -> str:
        """Digest that tells the data from any other."""
        return fingerprint_of(jax.tree.leaves(self.task))

    @property
    def at_once(self) -> int:
        """Seeds that are vmapped together."""
        experiment = self.experiment
        return experiment.seeds_at_once or (1 if jax.default_backend() == "cpu" else experiment.seeds)

    def _fit(self, part: str, params, keys, bits: Bits, run: RunDirectory, console: Console) -> NodeState:
        """Train all seeds from `params`, or go on with training."""
        experiment, name = self.experiment, f"{self.variant.name}/{part}"
        tunes = part != FULL and experiment.start == "trained"
        epochs = experiment.tune_epochs if tunes else experiment.epochs
        optimizer = self.tuner if tunes else self.optimizer
        state = start_seeds(self.model, optimizer, params, keys, self.task, bits, at_once=self.at_once)
        with (
            Checkpoints(run.checkpoints(name)) as checkpoints,
            Display(console, name, steps=epochs, done=checkpoints.last_step) as display,
            StopRequest() as stop,
        ):
            for folder in checkpoints.damaged:
                display.line(f"{name}: a damaged checkpoint was set aside as {folder}")
            done = checkpoints.last_step
            run.forget_after(name, done)
            if done:
                state = checkpoints.load(done, state)
                display.line(f"{name}: going on after epoch {done} of {epochs}")
            while done < epochs:
                start, length = time.perf_counter(), min(experiment.report_every, epochs - done)
                state, history = train_seeds(
                    self.model, optimizer, state, self.task, bits, epochs=length, at_once=self.at_once
                )
                history = jax.device_get(history)
                _check_finite(history["train_loss"], name, first_epoch=done + 1, first_seed=experiment.seed)
                done += length
                best = jax.device_get(state.best_accuracy)
                run.log(
                    variant=name,
                    epoch=done,
                    **{key: values[:, -1].tolist() for key, values in history.items()},
                    best_accuracy=best.tolist(),
                    seconds=round(time.perf_counter() - start, 3),
                )
                loss = float(np.mean(history["validation_loss"][:, -1]))
                checkpoints.save(done, state, {"accuracy": float(best.mean()), "loss": loss})
                display.step(length)
                if stop.signal_number:
                    raise Interrupted(
                        f"interrupted: {name} is saved after epoch {done} of {epochs}; the same command continues from "
                        "there",
                        stop.signal_number,
                    )
            best = jax.device_get(state.best_accuracy).mean()
            display.line(f"{name}: {epochs} epochs of {experiment.seeds} seeds, best validation accuracy {best:.1%}")
        return state

    def _keep(self, folder: Path, state: NodeState, bits: Bits) -> None:
        """Write the network of the seed with the best validation accuracy where `qpde.load` reads it."""
        best = int(jnp.argmax(state.best_accuracy))
        seed = self.experiment.seed + best
        about = {"variant": self.variant.name, "seed": seed, "data": self.experiment.data.name}
        qpde.save(
            folder,
            self.model.with_bits(bits),
            {"params": jax.tree.map(lambda leaf: leaf[best], state.best_params)},
            classes=self.classes,
            about=about | {"data_fingerprint": self.fingerprint} | provenance(),
        )

    def _compare(self, params, bits: Bits) -> dict[str, list]:
        """Faithfulness on the test nodes, each field a list over seeds."""
        found = []
        for i in range(self.experiment.seeds):
            variables = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params)}
            found.append(compare(self.model, variables, [(self.task.graph, self.task.test)], bits).as_dict())
        return {key: [result[key] for result in found] for key in found[0]}


def _clip_method(bits: int) -> str:
    """Few levels are better spent below the largest values."""
    return "absmax" if bits >= 8 else "percentile"


def _best_epoch(state: NodeState) -> dict[str, list[int]]:
    return {"best_epoch": state.best_epoch.tolist()}


def _count(params) -> int:
    """Trained numbers of one seed without clips."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf[0].size for path, leaf in leaves if "clips" not in path_name(path))


def _check_finite(losses: np.ndarray, name: str, *, first_epoch: int, first_seed: int) -> None:
    broken = np.argwhere(~np.isfinite(losses.T))
    if broken.size:
        epoch, seed = broken[0]
        raise FloatingPointError(
            f"{name}: the loss of seed {first_seed + seed} in epoch {first_epoch + epoch} is not finite; "
            "try a smaller --optimizer.learning-rate"
        )
