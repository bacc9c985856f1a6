"""Training that starts from the networks of a finished run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import qpde
from qpde.bits import Bits
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.options import NetworkOptions
from train.steps.annealing import SMOOTHING
from train.steps.paths import path_name


@dataclasses.dataclass(frozen=True)
class Start:
    """A trained network.

    Attributes:
      variables: Its collections.
      bits: Bits that it was trained at.
    """

    variables: dict[str, Any]
    bits: Bits


def read_start(run: Path, variant: str, options: NetworkOptions, shapes: dict[str, Any], *, calibrated: bool) -> Start:
    """Read a variant of a finished run, as it was evaluated there.

    Args:
      run: Folder of the run.
      variant: Name of the variant there.
      options: Options of the network that goes on.
      shapes: Variables that are needed.
      calibrated: Whether it is quantized by `qpde.ptq` first.
    Raises:
      FileNotFoundError: No such run or variant, or it is not finished.
      ValueError: It is a run on a graph, or its network cannot go on as this one.
    """
    try:
        network = qpde.load(run / variant)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"start_from (={run}): {error}; a run writes it when it is finished") from None
    if isinstance(network.model, GraphNetwork):
        raise ValueError(f"start_from (={run}) is a run on a graph: give one on images")
    _check_rounding(network.model.options, options, calibrated=calibrated)
    _check_shapes(run, network.variables, shapes)
    return Start(dict(network.variables), network.model.bits)


def cause_of_breakdown(start: Start | None, options: NetworkOptions) -> str:
    """A sentence for a training that breaks down and has changed its start's kernels; empty elsewhere.

    Args:
      start: Where it started from.
      options: Options of its network.
    """
    if start is None or start.bits.weights is not None or options.weight_bits is None or not options.standardize:
        return ""
    return ". It started from kernels without standardization: --model.no-standardize goes on with them"


def _check_rounding(there: NetworkOptions, here: NetworkOptions, *, calibrated: bool) -> None:
    """ValueError where a network cannot go on with the weights of another because of how they are rounded."""
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


def _check_shapes(run: Path, variables: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    def described(tree):
        tree = {name: part for name, part in tree.items() if name != SMOOTHING}  # any network takes it and goes on
        return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}

    found, needed = described(variables), described(shapes)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise ValueError(
                f"start_from (={run}) has another network: {name} has shape {found.get(name)} there, "
                f"{needed.get(name)} is needed"
            )
