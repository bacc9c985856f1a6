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
    SmoothingSchedule,
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
    "SmoothingSchedule",
    "Variant",
]
