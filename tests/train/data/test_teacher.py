"""A teacher's probabilities as targets: their formula, what is refused, and a run that learns from one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpde
from qpde.datasets import load_digits
from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import main
from train.config.images import Data, Loss
from train.config.segmentation import SegmentationLoss
from train.data.resident import Resident, make_inputs
from train.data.teacher import read_teacher

TINY = Architecture("tiny", BasicBlock, ((4, 4, 1, 1, 1),))
CONFIG = """
from train.config import Data, Experiment, Model, Variant

def experiment(**changes):
    variants = (Variant("plain", {"symmetric": False}),)
    return Experiment(
        variants=variants, data=Data("digits", size=8, crop_padding=1, flip=False), epochs=1, batch_size=256, **changes
    )

recipes = {
    "teacher": experiment(name="teacher", model=Model("tiny", width=2.0, weight_bits=None, act_bits=None)),
    "student": experiment(name="student", model=Model("tiny")),
}
"""


@pytest.fixture(scope="module")
def digits():
    return Resident(load_digits(size=8), 32)


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    """A folder with a network of random weights, and that network as a function of the digits as they are stored."""
    folder = tmp_path_factory.mktemp("teacher") / "network"
    model = qpde.models.image_network(TINY, num_classes=10, symmetric=False)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *digits.shape)))
    # A normalisation of its own: what comes normalised for the student is not what it takes.
    options = {"input_shape": digits.shape, "mean": [0.25], "std": [0.5]}
    qpde.save(folder, model, variables, classes=digits.stored.classes, **options)
    return folder, qpde.load(folder)


def test_the_targets_are_the_labels_and_the_probabilities_of_the_teacher(digits, teacher):
    folder, network = teacher
    (images, labels), *_ = digits.first_batches(limit=1)
    inputs = make_inputs(Data(flip=False, crop_padding=0), digits, read_teacher(folder, 0.3, digits))
    x, targets, same = jax.jit(inputs)(jax.random.key(0), images, labels)
    np.testing.assert_array_equal(same, labels)
    np.testing.assert_allclose(x, digits.normalize(jnp.asarray(images)), atol=1e-6)
    logits = network.logits(images).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(targets, 0.7 * np.eye(10)[labels] + 0.3 * probabilities, atol=1e-5)


def test_a_teacher_sees_mixed_images(digits, teacher):
    folder, network = teacher
    (images, labels), *_ = digits.first_batches(limit=1)
    inputs = make_inputs(Data(flip=False, crop_padding=0, mixup=1.0), digits, read_teacher(folder, 1.0, digits))
    x, targets, _ = jax.jit(inputs)(jax.random.key(1), images, labels)
    stored = digits.stored
    logits = network.logits(np.asarray(x) * stored.std + stored.mean)
    np.testing.assert_allclose(targets, jax.nn.softmax(logits), atol=1e-5)


def test_a_teacher_that_does_not_fit_is_refused(digits, teacher, tmp_path):
    _, network = teacher
    with pytest.raises(FileNotFoundError, match=r"loss.teacher \(=.*nothing\).*RUN/VARIANT"):
        read_teacher(tmp_path / "nothing", 0.5, digits)

    def saved(name, **changes):
        options = {"classes": digits.stored.classes, "input_shape": digits.shape} | changes
        qpde.save(tmp_path / name, network.model, network.variables, **options)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"10 classes \(cat0, cat1, cat2, cat3, ...\).*same classes"):
        read_teacher(saved("cats", classes=[f"cat{i}" for i in range(10)]), 0.5, digits)
    with pytest.raises(ValueError, match="trained on images of 32x32x1, these are 8x8x1"):
        read_teacher(saved("large", input_shape=(32, 32, 1)), 0.5, digits)


def test_a_loss_that_has_no_place_for_a_teacher_is_refused():
    for weight in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"loss.teacher_weight \(=.*at most 1"):
            Loss(teacher="runs/a/plain", teacher_weight=weight)
    with pytest.raises(ValueError, match="similarity"):
        Loss("similarity", teacher="runs/a/plain")
    with pytest.raises(ValueError, match="classifiers"):
        SegmentationLoss(teacher="runs/a/plain")


@pytest.mark.usefixtures("compiled_once")
def test_a_run_learns_from_another_and_notices_when_that_has_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    assert main(["run", "tiny.py"]) == 0
    learn = ["run", "tiny.py", "--recipe", "student", "--loss.teacher", "runs/teacher/plain"]
    assert main(learn) == 0
    assert main([*learn[:4], "--name", "alone"]) == 0
    for name, has_teacher in (("student", True), ("alone", False)):
        assert (tmp_path / "runs" / name / "start.json").exists() == has_teacher
    losses = [
        json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text())["train_loss"]
        for name in ("student", "alone")
    ]
    assert losses[0] != losses[1]

    capsys.readouterr()
    assert main(["run", "tiny.py", "--seed", "1", "--overwrite"]) == 0
    assert main(["reproduce", "runs/student"]) == 2
    assert "network runs/teacher/plain was" in capsys.readouterr().err
