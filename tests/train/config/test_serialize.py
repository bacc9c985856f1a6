"""Experiments as JSON."""

import dataclasses
import json

import pytest

from qpde.models import Smoothing
from train.config.images import Annealing, BitSchedule, Experiment, Model, Optimizer, Rule, Variant
from train.config.serialize import from_json, to_json

EXPERIMENT = Experiment(
    name="example",
    variants=(Variant("symmetric"), Variant("plain", {"symmetric": False})),
    model=Model(smoothing=Smoothing(blocks=(1, 2))),
    optimizer=Optimizer(rules=(Rule("clip", learning_rate=10.0, weight_decay=0.0),)),
    annealing=Annealing(activations=BitSchedule("listed", bits=(8, 6))),
)


def _changed(**changes):
    return from_json(json.dumps(json.loads(to_json(EXPERIMENT)) | changes))


def test_an_experiment_survives_json():
    assert from_json(to_json(EXPERIMENT)) == EXPERIMENT
    assert from_json(to_json(dataclasses.replace(EXPERIMENT, model=Model(), only=("plain",)))).only == ("plain",)
    smoothed = dataclasses.replace(EXPERIMENT, variants=(Variant("smoothed", {"smoothing": Smoothing(blocks=(0, 2))}),))
    assert from_json(to_json(smoothed)) == smoothed
    steps = dataclasses.replace(
        EXPERIMENT, variants=(Variant("a", {"step_size": "auto"}), Variant("b", {"step_size": 1}))
    )
    assert from_json(to_json(steps)) == steps


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: from_json("{}"), "not an experiment of this version"),
        (lambda: from_json("{"), "property name"),
        (lambda: _changed(epochs="ten"), r"epochs \(='ten'\) must be int"),
        (lambda: _changed(epochs=True), r"epochs \(=True\) must be int"),
        (lambda: _changed(only="plain"), r"only \(='plain'\) must be"),
        (lambda: _changed(model={"weight_bits": "four"}), r"weight_bits \(='four'\) must be int"),
        (lambda: _changed(model={"step_size": "long"}), r"step_size \(='long'\) must be"),
        (lambda: _changed(seed=None), r"seed \(=None\) must be int"),
    ],
)
def test_a_bad_value_in_a_file_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
