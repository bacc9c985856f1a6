"""Training on graphs: the steps against loops written out, and the job through its command line."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qpde
import qpde.models
from qpde.bits import Bits
from qpde.datasets import NodeGraph, SparseRows
from train.commands.cli import load_recipes, main
from train.config.graphs import GraphData, GraphExperiment, GraphModel, GraphVariant
from train.config.images import Adam, Model, Rule
from train.config.serialize import from_json, to_json
from train.runs.checkpoints import Checkpoints
from train.runs.warm_start import read_start
from train.steps.losses import classification_sums
from train.steps.optimizer import create_optimizer
from train.tasks import nodes_step as steps
from train.tasks.nodes_data import make_task
from train.tasks.nodes_summary import check_pictures

pytestmark = pytest.mark.usefixtures("compiled_once")

EXACT = Bits(None, None)
EXPERIMENT = GraphExperiment(
    "tiny",
    variants=(GraphVariant("symmetric-2"), GraphVariant("gcn", {"name": "gcn"})),
    model=GraphModel(layers=2, width=8, dropout=0.2),
    optimizer=Adam(0.05, rules=(Rule("layers", learning_rate=0.1), Rule("", weight_decay=1e-3))),
    bits=((8, 8), (3, 3)),
    epochs=4,
    tune_epochs=2,
    seeds=2,
    report_every=3,
)


@pytest.fixture(scope="module", autouse=True)
def optax_promotes():
    """optax's Adam raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def small_graph(labels=(0, 1, 2) * 4, train=range(6)):
    """A ring of twelve nodes in three classes with four features, the last node without a label."""
    labels = np.array([*labels[:11], -1], np.int32)
    nodes = np.arange(12, dtype=np.int32)
    rng = np.random.default_rng(0)
    features = SparseRows(np.repeat(nodes, 2), np.tile([0, 2], 12).astype(np.int32), rng.random(24, np.float32))
    return NodeGraph(
        senders=nodes[:-1],
        receivers=nodes[1:],
        features=features,
        labels=labels,
        train=np.array(train, np.int32),
        validation=np.arange(6, 9, dtype=np.int32),
        test=np.arange(9, 11, dtype=np.int32),
        num_features=4,
        num_classes=3,
    )


TASK = make_task(small_graph())
MODEL = qpde.models.create("pde_gcn", num_classes=3, layers=2, width=4, dropout=0.3)
KEYS = jax.random.split(jax.random.key(3), 4)
PARAMS = steps.init_seeds(MODEL, KEYS, TASK, EXACT, methods=EXACT, at_once=1)
OPTIMIZER = create_optimizer(Adam(0.1, weight_decay=1e-3), jax.tree.map(lambda p: p[0], PARAMS), steps=1)


def started(bits=EXACT, at_once=1):
    return steps.start_seeds(MODEL, OPTIMIZER, PARAMS, KEYS, TASK, bits, at_once=at_once)


def test_epochs_in_a_scan_are_the_loop_written_out():
    states, history = steps.train_seeds(MODEL, OPTIMIZER, started(), TASK, EXACT, epochs=5, at_once=1)

    @partial(jax.jit, static_argnames="train")
    def loss_of(params, key, labels, *, train):
        rngs = {"dropout": key} if train else None
        sums = classification_sums(MODEL.apply({"params": params}, TASK.graph, train=train, rngs=rngs), labels)
        return sums["loss"] / sums["count"], sums["correct"] / sums["count"]

    gradient = jax.jit(jax.value_and_grad(partial(loss_of, train=True), has_aux=True))
    for i in range(2):
        params = jax.tree.map(lambda p, i=i: p[i], PARAMS)
        adam = optax.adam(0.1)
        loss, accuracy = loss_of(params, None, TASK.validation, train=False)
        opt_state, scores = adam.init(params), [(float(accuracy), -float(loss), 0)]
        for epoch in range(5):
            key = jax.random.fold_in(KEYS[i], epoch)
            (loss, _), grads = gradient(params, key, TASK.train)
            assert jnp.allclose(loss, history["train_loss"][i, epoch], rtol=1e-4)
            grads = jax.tree.map(lambda g, p: g + 1e-3 * p, grads, params)
            updates, opt_state = adam.update(grads, opt_state)
            params = optax.apply_updates(params, updates)
            loss, accuracy = loss_of(params, None, TASK.validation, train=False)
            scores.append((float(accuracy), -float(loss), epoch + 1))
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(states.params), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-3, atol=1e-4)
        assert int(states.best_epoch[i]) == max(scores)[2]
        np.testing.assert_allclose(states.best_accuracy[i], max(scores)[0])


def test_epochs_move_nothing_between_host_and_device():
    bits = jax.device_put(Bits(np.float32(4), np.float32(4)))
    states, others = started(bits), started(bits)
    with jax.transfer_guard("disallow"):
        steps.train_seeds(MODEL, OPTIMIZER, states, TASK, bits, epochs=3, at_once=1)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        steps.train_seeds(MODEL, OPTIMIZER, others, TASK, Bits(np.float32(4), np.float32(4)), epochs=3, at_once=1)


@pytest.mark.parametrize("bits", [EXACT, Bits(jnp.float32(4), jnp.float32(4))])
def test_seeds_side_by_side_are_the_seeds_one_after_another(bits):
    one, apart = steps.train_seeds(MODEL, OPTIMIZER, started(bits), TASK, bits, epochs=3, at_once=1)
    all_, together = steps.train_seeds(MODEL, OPTIMIZER, started(bits, 4), TASK, bits, epochs=3, at_once=4)
    for name in apart:
        np.testing.assert_allclose(apart[name], together[name], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(one.best_params), jax.tree.leaves(all_.best_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert len(np.unique(np.asarray(apart["train_loss"])[:, -1])) == 4  # the seeds differ


def test_calls_of_other_lengths_continue_the_same_training():
    whole, history = steps.train_seeds(MODEL, OPTIMIZER, started(), TASK, EXACT, epochs=5, at_once=1)
    state, first = steps.train_seeds(MODEL, OPTIMIZER, started(), TASK, EXACT, epochs=3, at_once=1)
    state, second = steps.train_seeds(MODEL, OPTIMIZER, state, TASK, EXACT, epochs=2, at_once=1)
    for name, values in history.items():
        np.testing.assert_allclose(np.concatenate([first[name], second[name]], axis=1), values, rtol=1e-5)
    np.testing.assert_array_equal(state.best_epoch, whole.best_epoch)


def test_clips_are_read_with_the_method_of_their_own_part():
    bits, methods = Bits(jnp.float32(4), jnp.float32(4)), Bits("absmax", "percentile")
    found = steps.calibrate_seeds(MODEL, PARAMS, TASK, bits, methods=methods, at_once=1)["layers"]
    np.testing.assert_allclose(found["weight_clips"], np.abs(PARAMS["layers"]["kernel"]).max((2, 3))[..., None])
    by_max = steps.calibrate_seeds(MODEL, PARAMS, TASK, bits, methods=Bits("absmax", "absmax"), at_once=1)["layers"]
    assert (found["act_clips"][:, 0] < by_max["act_clips"][:, 0]).all()  # later layers see other inputs
    assert (by_max["act_clips"] != PARAMS["layers"]["act_clips"]).all()


def test_energy_falls_along_a_diffusion_and_accuracy_counts_test_nodes_only():
    accuracy, energy = steps.test_seeds(MODEL, PARAMS, TASK, at_once=1)
    assert energy.shape == (4, 2)
    assert (energy[:, 1] < energy[:, 0]).all()
    logits = MODEL.apply({"params": jax.tree.map(lambda p: p[1], PARAMS)}, TASK.graph)
    np.testing.assert_allclose(accuracy[1], np.mean(np.argmax(logits, 1)[9:11] == small_graph().labels[9:11]))


def test_experiments_survive_json():
    assert from_json(to_json(EXPERIMENT)) == EXPERIMENT
    smooth = dataclasses.replace(EXPERIMENT.model, smoothing=qpde.models.GraphSmoothing(steps=2), step_size="auto")
    assert from_json(to_json(dataclasses.replace(EXPERIMENT, model=smooth))).model == smooth


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds_at_once": 3}, r"seeds_at_once \(=3\) must divide the 2 seeds"),
        ({"bits": ((4, 4), (4, 4))}, "twice"),
        ({"bits": ((4, 1),)}, "bits holds 1"),
        ({"tune_learning_rate": 0.0}, r"tune_learning_rate \(=0.0\)"),
        ({"epochs": 0}, r"epochs \(=0\)"),
        ({"variants": (GraphVariant("a", {"colour": 1}),)}, "colour"),
    ],
)
def test_an_experiment_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPERIMENT, **changes)


def test_no_training_on_images_starts_from_a_run_on_a_graph(tmp_path):
    model = qpde.models.pde_gcn(num_classes=3, layers=1, width=2)
    graph = make_task(small_graph()).graph
    shapes = jax.eval_shape(model.init, jax.random.key(0), graph)
    qpde.save(tmp_path / "symmetric", model, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes))
    with pytest.raises(ValueError, match="is a run on a graph: give one on images"):
        read_start(tmp_path, "symmetric", Model(), {}, calibrated=False)


def test_more_variants_than_a_picture_shows_are_refused_before_training():
    eight = tuple(GraphVariant(f"{letter}-2") for letter in "abcdefgh")
    with pytest.raises(ValueError, match="8 variants are more than the 7 that one picture tells apart"):
        check_pictures(dataclasses.replace(EXPERIMENT, variants=eight))
    deeper = tuple(GraphVariant(f"a-{n}", {"layers": n}) for n in range(1, 9))
    check_pictures(dataclasses.replace(EXPERIMENT, variants=deeper))


def test_the_digits_have_no_full_split():
    with pytest.raises(ValueError, match="full"):
        GraphData("digits", split="full")


def test_a_label_that_is_missing_inside_a_split_is_refused_and_outside_it_is_not():
    assert int(TASK.test[11]) == -1
    with pytest.raises(ValueError, match="node 11"):
        small_graph(train=(0, 11))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A file with the tiny experiment, in a fresh folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    lines = [
        "from train.config.serialize import from_json",
        f"recipes = {{'fast': from_json({to_json(EXPERIMENT)!r})}}",
    ]
    (tmp_path / "tiny.py").write_text("\n".join(lines) + "\n")
    return "tiny.py"


def results_of(name):
    return json.loads(Path("runs", name, "summary.json").read_text())["variants"]


def test_a_run_leaves_everything_and_an_interrupted_one_ends_the_same(config, monkeypatch, capsys):
    assert main(["run", config, "--name", "whole"]) == 0
    printed = capsys.readouterr().out
    for words in ("symmetric-2", "gcn", "full", "W8A8", "W3A3", "agreement", "relative", "±"):
        assert words in printed
    run = Path("runs", "whole")
    assert {"layer_error_2.png", "over_smoothing.png", "config.json"} <= {path.name for path in run.iterdir()}
    whole = results_of("whole")
    assert whole["symmetric-2"]["parameters"] == 64 * 8 + 8 + 2 * 8 * 8 + 8 * 10 + 10
    for result in whole.values():
        assert len(result["full"]["accuracy"]) == 2
        assert len(result["full"]["energy"][0]) == 2
        for part in ("W8A8", "W3A3"):
            assert len(result[part]["agreement"]) == len(result[part]["untuned"]["accuracy"]) == 2
            assert result[part]["samples"] == [1000, 1000]
            assert len(result[part]["layer_error"][0]) == 2
        assert np.mean(result["W3A3"]["mean_layer_error"]) > np.mean(result["W8A8"]["mean_layer_error"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["variant"], line["epoch"]) for line in lines][:4] == [
        ("symmetric-2/full", 3),
        ("symmetric-2/full", 4),
        ("symmetric-2/W8A8", 2),
        ("symmetric-2/W3A3", 2),
    ]

    saves, save = [], Checkpoints.save

    def interrupt(*arguments):
        saves.append(1)
        if len(saves) in (2, 4):
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", interrupt)
    command = ["run", config, "--name", "cut", "--only", "symmetric-2"]
    assert [main(command) for _ in range(3)] == [130, 130, 0]
    assert "going on after epoch 3 of 4" in capsys.readouterr().out
    assert results_of("cut") == {"symmetric-2": whole["symmetric-2"]}
    assert main(command) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_quantized_networks_can_start_from_random_weights(config):
    options = ["--start", "random", "--only", "symmetric-2", "--bits", "4", "4", "--seeds-at-once", "2"]
    assert main(["run", config, *options]) == 0
    result = results_of("tiny")["symmetric-2"]
    assert set(result) == {"parameters", "full", "W4A4"}
    assert "untuned" not in result["W4A4"]


def test_a_loss_that_is_no_number_ends_the_run_and_names_seed_and_epoch(config, capsys):
    assert main(["run", config, "--only", "gcn", "--optimizer.learning-rate", "1e30"]) == 1
    assert "gcn/full: the loss of seed 0 in epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.width", "0"], "width must be at least 1"),
        (["--model.step-size", "-1"], "step_size"),
        (["--data.name", "cora"], "give --data-dir or set QPDE_DATA_DIR"),
        (["--data.name", "cora", "--data-dir", "nowhere"], "nowhere"),
        (["--bits", "4", "1"], "give some of 2 to 32"),
    ],
)
def test_bad_input_is_refused_with_its_reason_and_nothing_written(config, monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("QPDE_DATA_DIR", raising=False)
    try:
        status = main(["run", config, *arguments])
    except SystemExit as exit:  # tyro's own refusals
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["digits_graph"])
def test_every_experiment_file_names_its_command(name, pytestconfig):
    path = pytestconfig.rootpath / "configs" / f"{name}.py"
    assert path.read_text().startswith(f'"""python -m train run configs/{name}.py')
    assert all(isinstance(recipe, GraphExperiment) for recipe in load_recipes(path).values())


def test_real_cora_is_learned_from_twenty_labels_a_class(data_dir):
    task = make_task(qpde.datasets.load_planetoid("cora", data_dir))
    model = qpde.models.create("pde_gcn", num_classes=7, layers=2, width=16, dropout=0.5)
    params = steps.init_seeds(model, KEYS[:1], task, EXACT, methods=EXACT, at_once=1)
    rules = (Rule("layers", learning_rate=0.02), Rule("", weight_decay=5e-4))
    optimizer = create_optimizer(Adam(0.07, rules=rules), jax.tree.map(lambda p: p[0], params), steps=1)
    state = steps.start_seeds(model, optimizer, params, KEYS[:1], task, EXACT, at_once=1)
    state, _ = steps.train_seeds(model, optimizer, state, task, EXACT, epochs=30, at_once=1)
    accuracy, _ = steps.test_seeds(model, state.best_params, task, at_once=1)
    assert accuracy[0] > 0.75
