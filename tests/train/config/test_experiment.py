"""Experiments: what they refuse, by name."""

import dataclasses
import math

import pytest

from qpde.models import Smoothing
from train.config.images import (
    Annealing,
    BitSchedule,
    Data,
    Experiment,
    Loss,
    Model,
    Optimizer,
    Rule,
    SmoothingSchedule,
    Variant,
)

EXPERIMENT = Experiment(
    name="example",
    variants=(Variant("symmetric"), Variant("plain", {"symmetric": False})),
    model=Model(smoothing=Smoothing(blocks=(1, 2))),
    optimizer=Optimizer(rules=(Rule("clip", learning_rate=10.0, weight_decay=0.0),)),
    annealing=Annealing(activations=BitSchedule("listed", bits=(8, 6))),
)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Optimizer(learning_rate=0.0), r"learning_rate \(=0.0\) must be positive"),
        (lambda: Optimizer(learning_rate=math.inf), r"learning_rate \(=inf\)"),
        (lambda: Optimizer(momentum=1.0), r"momentum \(=1.0\) must lie in \[0, 1\)"),
        (lambda: Optimizer(momentum=0.0, nesterov=True), "nesterov needs a momentum"),
        (lambda: Optimizer(weight_decay=-1.0), r"weight_decay \(=-1.0\)"),
        (lambda: Rule("("), "not a regular expression"),
        (lambda: Rule("clip", learning_rate=math.nan), r"rule 'clip' \(=nan\)"),
        (lambda: Data(size=0), r"data.size \(=0\) must be at least 1"),
        (lambda: Data(crop_padding=-1), r"crop_padding \(=-1\)"),
        (lambda: dataclasses.replace(EXPERIMENT, variants=(Variant("a", {"colour": 1}),)), "colour"),
        (lambda: Variant("../a"), "names a folder"),
        (lambda: dataclasses.replace(EXPERIMENT, name=""), "names a folder"),
        (lambda: dataclasses.replace(EXPERIMENT, epochs=0), r"epochs \(=0\) trains nothing: give --start-from"),
        (lambda: dataclasses.replace(EXPERIMENT, reset_clips=True), "reset_clips.*give --start-from RUN"),
        (lambda: dataclasses.replace(EXPERIMENT, batch_size=1), r"batch_size \(=1\) must be at least 2"),
        (lambda: dataclasses.replace(EXPERIMENT, variants=()), "at least one"),
        (lambda: dataclasses.replace(EXPERIMENT, variants=(Variant("a"), Variant("a"))), "different names"),
        (lambda: dataclasses.replace(EXPERIMENT, only=("b",)), "choose from"),
        (lambda: Data(mixup=-1.0), r"data.mixup \(=-1.0\)"),
        (lambda: Loss(label_smoothing=1.0), r"label_smoothing \(=1.0\) must lie in \[0, 1\)"),
        (lambda: Loss(similarity_weight=math.nan), r"similarity_weight \(=nan\)"),
        (lambda: Optimizer(averaging=1.0), r"averaging \(=1.0\) must lie in \[0, 1\)"),
        (lambda: BitSchedule(every=0), r"every \(=0\)"),
        (lambda: BitSchedule(bits=(8, 40)), "holds 40: bits are 2 to 32"),
        (lambda: SmoothingSchedule("rise", 0), r"annealing.smoothing.epochs \(=0\)"),
        (lambda: BitSchedule("random"), "needs bits to draw from"),
    ],
)
def test_a_bad_value_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
