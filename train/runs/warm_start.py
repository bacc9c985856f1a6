"""Training that starts where another run ended."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from qpde.bits import Bits
from train.config.images import Experiment, Model
from train.runs.checkpoints import read_best
from train.runs.directory import CHECKPOINTS, read_experiment
from train.steps import twin_clips
from train.steps.annealing import SMOOTHING
from train.steps.paths import path_name


@dataclasses.dataclass(frozen=True)
class Start:
    """A trained network.

    Attributes:
      variables: its collections; with the twin's clips, if it was distilled.
      bits: widths it was trained at.
    """

    variables: dict[str, Any]
    bits: Bits


def read_start(run: Path, variant: str, shapes: dict[str, Any]) -> Start:
    """The best state of a variant in a run's folder, averages instead of what they are averages of.

    Args:
      run: the folder.   variant: its name there.   shapes: of the variables that are needed, without the twin's clips.
    Raises:
      FileNotFoundError: no such run or variant, or it has not finished an epoch.
      ValueError: it is a run on a graph, or its network has other parameters.
    """
    model = read_model(run, variant)
    state, _ = read_best(run / CHECKPOINTS / variant)
    values = state if state["averages"] is None else state["averages"]
    variables = {"params": values["params"], **values["model_state"]}
    _check_shapes(run, variables, shapes)
    return Start(variables, Bits(model.weight_bits, model.act_bits))


def read_model(run: Path, variant: str) -> Model:
    """The configuration of the network of a variant in a run's folder.

    Raises:
      FileNotFoundError: no such run or variant.   ValueError: it is a run on a graph.
    """
    experiment = read_experiment(run)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"start_from (={run}) is a run on a graph: give one on images")
    named = [v for v in experiment.variants if v.name == variant]
    if not named:
        names = [v.name for v in experiment.variants]
        raise FileNotFoundError(f"start_from (={run}) has no variant {variant!r}: it has {names}")
    return experiment.model_of(named[0])


def check_rounding(there: Model, here: Model, *, calibrated: bool) -> None:
    """ValueError where a network cannot go on with the weights of another because of how they are rounded.

    Args:
      there, here: the network that was trained, and the one that goes on.
      calibrated: it is quantized by `qpde.calibration`.
    """
    if calibrated:
        if (there.weight_bits, there.act_bits) != (None, None):
            raise ValueError(
                "calibration quantizes a network trained in full precision, and start_from has one of "
                f"{there.weight_bits}-bit weights and {there.act_bits}-bit activations: train it with "
                "--model.weight-bits None --model.act-bits None"
            )
        if here.standardize:
            raise ValueError(
                "model.standardize (=True) would change the function that calibration is to keep: give "
                "--model.no-standardize, or use `python -m train quantize`"
            )
    elif None not in (there.weight_bits, here.weight_bits) and there.standardize != here.standardize:
        raise ValueError(
            f"start_from was quantized with model.standardize={there.standardize}: give "
            f"{'--model.standardize' if there.standardize else '--model.no-standardize'}"
        )


def _check_shapes(run: Path, variables: dict[str, Any], shapes: dict[str, Any]) -> None:
    def described(tree):
        tree = {**tree, "params": twin_clips.low(tree["params"])}
        tree.pop(SMOOTHING, None)  # any network takes it, and goes on with it
        return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}

    found, needed = described(variables), described(shapes)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise ValueError(
                f"start_from (={run}) has another network: {name} has shape {found.get(name)} there, "
                f"{needed.get(name)} is needed"
            )
