"""Numbers and names that only fail later are refused where they are given."""

import jax
import numpy as np
import pytest

from qpde.suggestions import did_you_mean
from train.commands.sweep import Sweep, prepare_sweep
from train.config.graphs import GraphData, GraphExperiment, GraphVariant
from train.config.images import Experiment, Model, Variant
from train.config.serialize import from_json, to_json
from train.steps.state import RANDOM

IMAGES = Experiment("a", (Variant("plain"),))
_LAST = 2**32 - 1


def _graph(**options):
    return GraphExperiment("a", (GraphVariant("plain"),), **options)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**20])
def test_a_seed_that_makes_no_key_of_its_own_is_refused(seed):
    for build in (lambda: Experiment("a", (Variant("b"),), seed=seed), lambda: _graph(seed=seed, seeds=1)):
        with pytest.raises(ValueError, match=rf"seed \(={seed}\) must lie in 0 to {_LAST}"):
            build()
    with pytest.raises(ValueError, match="split_seed"):
        GraphData(split_seed=seed)


def test_the_largest_seed_is_one_and_all_seeds_of_a_run_count():
    assert Experiment("a", (Variant("b"),), seed=_LAST).seed == _LAST
    keys = [jax.random.key_data(jax.random.key(seed, impl=RANDOM)) for seed in (0, 2**31, _LAST)]
    assert len({tuple(np.asarray(key)) for key in keys}) == 3
    assert _graph(seed=_LAST - 9, seeds=10).seed == _LAST - 9
    with pytest.raises(ValueError, match=rf"seed \(={_LAST - 8}\) must lie in 0 to {_LAST - 9}"):
        _graph(seed=_LAST - 8, seeds=10)
    with pytest.raises(ValueError, match=r"seed \(=4294967296\)"):
        prepare_sweep(Sweep(Experiment("a", (Variant("b"),), model=Model(), seed=_LAST), "fast", seeds=2))


@pytest.mark.parametrize("field", ["epochs", "batch_size", "accumulate", "workers", "checkpoint_every", "devices"])
def test_an_integer_that_no_counter_holds_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field} \(={10**20}\) must be at most 2147483647"):
        Experiment("a", (Variant("b"),), **{field: 10**20})


def test_devices_are_a_number_or_all():
    assert from_json(to_json(Experiment("a", (Variant("b"),), devices="all"))).devices == "all"
    with pytest.raises(ValueError, match=r"devices \(=0\) must be at least 1: give --devices all"):
        Experiment("a", (Variant("b"),), devices=0)
    with pytest.raises(ValueError, match=r"devices \(=-1\) must be at least 1"):
        Experiment("a", (Variant("b"),), devices=-1)
    with pytest.raises(ValueError, match=r"devices \(='some'\) must be int or 'all'"):
        from_json(to_json(IMAGES).replace('"devices": 1', '"devices": "some"'))


@pytest.mark.parametrize("name", ["x" * 129, "é" * 65])
def test_a_name_that_a_file_system_may_refuse_is_refused_by_our_own_rule(name):
    assert Experiment("x" * 128, (Variant("é" * 64),)).name == "x" * 128
    for build in (lambda: Experiment(name, (Variant("a"),)), lambda: Variant(name)):
        with pytest.raises(ValueError, match=rf"has {len(name.encode())} bytes: choose one of at most 128"):
            build()


@pytest.mark.parametrize("name", ["checkpoints", "report", "tensorboard", "summary.json", "metrics.jsonl", "error.png"])
def test_a_variant_cannot_have_the_name_of_what_a_run_holds(name):
    """The folder of its network stands beside these."""
    with pytest.raises(ValueError, match="choose another name"):
        Variant(name)


def test_json_that_is_nested_deeper_than_python_reads_is_refused():
    deep = "[" * 100_000 + "]" * 100_000
    for text in (deep, to_json(IMAGES).replace('"changes": {}', f'"changes": {{"symmetric": {deep}}}')):
        with pytest.raises(ValueError, match="nested too deeply"):
            from_json(text)


def test_an_unknown_field_of_a_stored_experiment_is_named_with_what_was_meant():
    with pytest.raises(ValueError, match=r"unknown fields \['epoch'\]: did you mean 'epochs'\? choose from"):
        from_json(to_json(IMAGES).replace('"epochs"', '"epoch"'))


def test_a_suggestion_is_near_or_none():
    assert did_you_mean("qantize", ["run", "quantize"]) == "did you mean 'quantize'? "
    assert did_you_mean("dance", ["run", "quantize"]) == ""
