"""Training that starts where another run ended."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from qpde.bits import Bits
from train import twin
from train.checkpoints import read_best
from train.config import Experiment
from train.optimizer import path_name
from train.stored import from_json


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
      ValueError: its network has other parameters.
    """
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"start_from (={run}) is no folder of a run")
    experiment = from_json((run / "config.json").read_text())
    named = [v for v in experiment.variants if v.name == variant]
    if not (isinstance(experiment, Experiment) and named):
        names = [v.name for v in experiment.variants]
        raise FileNotFoundError(f"start_from (={run}) has no variant {variant!r} of images: it has {names}")
    state, _ = read_best(run / "checkpoints" / variant)
    values = state if state["averages"] is None else state["averages"]
    variables = {"params": values["params"], **values["model_state"]}
    _check_shapes(run, variables, shapes)
    model = experiment.model_of(named[0])
    return Start(variables, Bits(model.weight_bits, model.act_bits))


def _check_shapes(run: Path, variables: dict[str, Any], shapes: dict[str, Any]) -> None:
    def described(tree):
        tree = {**tree, "params": twin.low(tree["params"])}
        return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}

    found, needed = described(variables), described(shapes)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise ValueError(
                f"start_from (={run}) has another network: {name} has shape {found.get(name)} there, "
                f"{needed.get(name)} is needed"
            )
