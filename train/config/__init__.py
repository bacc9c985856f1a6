"""What an experiment is: frozen values, checked when they are built."""

from train.config.images import (
    Adam,
    Annealing,
    BitSchedule,
    Calibration,
    Comparison,
    Data,
    Experiment,
    Loss,
    Model,
    Optimizer,
    Rule,
    StrengthSchedule,
    Variant,
)

__all__ = [
    "Adam",
    "Annealing",
    "BitSchedule",
    "Calibration",
    "Comparison",
    "Data",
    "Experiment",
    "Loss",
    "Model",
    "Optimizer",
    "Rule",
    "StrengthSchedule",
    "Variant",
]
