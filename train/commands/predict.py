"""`python -m train predict RUN FILE...`: the classes of pictures, by the networks of a finished run."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

import qpde
from qpde.cli import Parser, add_prediction_arguments, maps_of, predictors_of
from qpde.predictions import predict_files
from qpde.suggestions import did_you_mean
from train.runs.directory import read_experiment, read_results

_DESCRIPTION = "Predict the classes of pictures with each network of a finished run."


def parse_predict(arguments: Sequence[str]) -> Callable[[Console], int]:
    """The work that the arguments of `predict` describe, everything about it checked but the pictures.

    Raises:
      ValueError, OSError: the folder holds no finished run on images, or an option is unusable.
      SystemExit: an option is unknown or wrong, or help was asked for; it is printed.
    """
    parser = Parser(prog="python -m train predict", description=_DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    add_prediction_arguments(parser)
    parser.add_argument("--variant", metavar="NAME", help="one of the run's networks; default: all of them")
    options = parser.parse_args(arguments)
    networks = {name: qpde.load(options.run / name) for name in _variants(options)}
    if any(network.is_segmenting for network in networks.values()):
        return lambda console: maps_of(networks, options)
    predictors = predictors_of(networks, options)
    return lambda console: predict_files(predictors, options.files, form=options.format)


def _variants(options: argparse.Namespace) -> list[str]:
    read_experiment(options.run)
    found = list(read_results(options.run))
    if options.variant is None:
        return found
    if options.variant not in found:
        meant = did_you_mean(options.variant, found)
        raise ValueError(f"{options.run} has no variant {options.variant!r}: {meant}choose from {found}")
    return [options.variant]
