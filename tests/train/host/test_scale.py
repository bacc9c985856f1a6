"""Training on several devices, in several processes and in several parts: as on one, but for the order of sums."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qpde.models
from qpde.bits import Bits
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
from train.commands.cli import main
from train.config.images import Experiment, Loss, Variant
from train.data.order import epoch_order, make_select
from train.host.compilation_cache import keep_compiled_programs
from train.host.distributed import from_first, join, largest
from train.host.mesh import make_mesh, put, replicated
from train.runs.checkpoints import damage
from train.steps.state import RANDOM, create_state
from train.steps.train_step import empty_totals, make_epoch_step, make_loss, make_train_step

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).parents[3]

# 2 epochs of 5 steps. DISTURB="SIGNAL COUNT" makes a process send itself the signal when it issued COUNT steps.
CONFIG = """
import os, signal
from qpde.models import registry
from qpde.models.images.blocks import BasicBlock
from train.config import Data, Experiment, Model, Variant
from train.host.console import Display

registry.ARCHITECTURES["tiny"] = registry.Architecture("tiny", BasicBlock, ((4, 4, 1, 1, 1),))
recipes = {"fast": Experiment(
    name="other",
    variants=(Variant("plain", {"symmetric": False, "weight_bits": None, "act_bits": None}),),
    data=Data("digits", size=8, crop_padding=1, flip=True),
    model=Model("tiny"),
    epochs=2,
    batch_size=256,
    checkpoint_every=2,
)}

name, count = os.environ.get("DISTURB", "SIGTERM 0").split()
left, step = [int(count)], Display.step

def disturbed(display):
    left[0] -= 1
    if left[0] == 0:
        signal.raise_signal(getattr(signal, name))
    step(display)

if int(count):
    Display.step = disturbed
"""


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A network of one block."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(registry.ARCHITECTURES, "tiny", registry.Architecture("tiny", BasicBlock, ((4, 4, 1, 1, 1),)))
        yield


# The step


class WithoutNorm(nn.Module):
    """What no image of a batch sees of another."""

    @nn.compact
    def __call__(self, x, *, train=False, bits=None, return_states=False):
        return nn.Dense(3)(nn.relu(nn.Dense(5)(x.reshape(len(x), -1))))


@functools.cache
def _trained(model, *, devices=1, accumulate=1):
    """State and sums after three steps of 16 images, those of a second time, and the compiled step's text."""
    mesh = make_mesh(devices)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, 3, 64).astype(np.int32)

    def prepare(key, images, labels):
        noise = jax.random.normal(key, images.shape)
        return images.astype(jnp.float32) / 128 - 1 + 0.1 * noise, jax.nn.one_hot(labels, 3), labels

    optimizer = optax.sgd(0.1, momentum=0.9)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    state = create_state(variables, optimizer, jax.random.key(1, impl=RANDOM))
    train_step = make_train_step(make_loss(model, Loss()), optimizer, prepare, accumulate=accumulate)
    step = make_epoch_step(train_step, make_select(steps_per_epoch=4, batch_size=16), mesh=mesh)
    first = put((state, empty_totals()), replicated(mesh))
    data = put((images, labels), replicated(mesh))
    order = epoch_order(first[0], count=64, steps_per_epoch=4)
    step = step.lower(*first, None, *data, order).compile()
    results = []
    for _ in range(2):
        state, totals = jax.tree.map(jnp.copy, first)  # the step takes its state's memory
        with jax.transfer_guard("disallow"):
            for _ in range(3):
                state, totals = step(state, totals, None, *data, order)
        results.append(jax.device_get((state.params, state.model_state, totals)))
    return *results, step.as_text()


def _assert_close(found, expected, *, rtol=1e-4, atol=1e-5):  # float32 sums in another order, a few steps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


def test_devices_share_the_images_of_a_batch_and_its_statistics_and_repeat_themselves():
    model = qpde.models.create("tiny", num_classes=3, symmetric=False, weight_bits=8, act_bits=8)
    one, _, text = _trained(model)
    assert "all-reduce" not in text
    for devices in (2, 4):
        several, again, text = _trained(model, devices=devices)
        jax.tree.map(np.testing.assert_array_equal, again, several)
        _assert_close(several, one)
        assert "all-reduce" in text
        assert f"f32[{16 // devices},8,8,4]" in text  # a device's maps
        assert "f32[16,8,8,4]" not in text


def test_a_step_calls_nothing_on_the_host():
    *_, text = _trained(WithoutNorm())
    assert not re.search("callback|infeed|outfeed|send|recv", text)


def test_a_network_that_computes_in_bfloat16_learns_as_in_float32():
    options = {"num_classes": 3, "symmetric": False, "weight_bits": 8, "act_bits": 8}
    (_, _, wide), *_ = _trained(qpde.models.create("tiny", **options))
    narrow, *_ = _trained(qpde.models.create("tiny", compute_dtype="bfloat16", **options))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow[:2])} == {np.dtype("float32")}
    assert narrow[2]["loss"] == pytest.approx(wide["loss"], rel=0.02)  # 8 bits of mantissa
    assert narrow[2]["loss"] != wide["loss"]


def test_gradients_of_parts_average_to_that_of_the_batch_without_batch_norms():
    whole, *_ = _trained(WithoutNorm())
    for devices in (1, 2):
        parts, _, text = _trained(WithoutNorm(), devices=devices, accumulate=4)
        _assert_close(parts, whole)
        assert f"f32[{4 // devices},5]" in text
        assert "f32[16,5]" not in text


def test_batch_norms_see_one_part_at_a_time_and_running_statistics_move_after_each():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False, bits=None, return_states=False):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x[:, :2, 0, 0])
            return nn.Dense(3)(x)

    images = jnp.arange(8 * 2, dtype=jnp.float32).reshape(8, 2, 1, 1) ** 2
    optimizer = optax.sgd(0.0)
    state = create_state(Norm().init(jax.random.key(0), images), optimizer, jax.random.key(1))
    prepare = lambda key, x, labels: (x, jax.nn.one_hot(labels, 3), labels)  # noqa: E731
    step = jax.jit(make_train_step(make_loss(Norm(), Loss()), optimizer, prepare, accumulate=2))
    after, sums = step(state, (images, jnp.zeros(8, jnp.int32)), jax.random.key(2), None)
    first, second = (np.asarray(images[i::2, :, 0, 0]).mean(0) for i in range(2))
    mean = after.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.25 * first + 0.5 * second, rtol=1e-6)
    assert float(sums["count"]) == 8


# A run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_once, tiny):
    """With the run on one device that the others are compared with."""
    path = tmp_path_factory.mktemp("scale")
    (path / "tiny.py").write_text(CONFIG)
    assert main(["run", str(path / "tiny.py"), "--runs-dir", str(path / "runs"), "--name", "one"]) == 0
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the tiny experiment: (exit status, what it printed)."""
    monkeypatch.chdir(folder)

    def call(name, *options):
        status = main(["run", "tiny.py", "--name", name, *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def _assert_ends_as_on_one_device(folder, name):
    results = []
    for run in (name, "one"):
        lines = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if isinstance(v, float) and k != "seconds"} for line in lines]
        summary = json.loads((folder / "runs" / run / "summary.json").read_text())["variants"]["plain"]
        results.append([*lines, {"accuracy": summary["accuracy"]}])
    for found, expected in zip(*results, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=4e-3)  # a prediction may turn over


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "5"], "devices (=5) exceeds the 4 of this machine: choose less, or all"),
        (["--devices", "3"], "batch_size (=256) must be a multiple of 3, 3 devices: choose 255"),
        (["--devices", "all", "--accumulate", "3"], "must be a multiple of 12, 4 devices times 3 parts (accumulate)"),
        (["--accumulate", "200"], "accumulate (=200) leaves less than 2 of 256 images a part"),
    ],
)
def test_a_batch_that_cannot_be_shared_evenly_is_refused(run, options, message):
    status, printed = run("refused", *options)
    assert status == 2
    assert message in printed


def test_the_mesh_is_part_of_the_configuration():
    assert Experiment("a", (Variant("a"),)).devices == 1
    assert make_mesh("all").size == 4


# Processes


def _run_two(folder, disturb=""):
    """Exit statuses and what the two processes printed; `disturb` is for the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "train", "run", "tiny.py", "--name", "two", "--devices", "all"]
    command += ["--distributed", address]
    running = [
        subprocess.Popen(
            [*command, "--processes", "2", "--process", str(i)],
            cwd=folder,
            env=environment | ({"DISTURB": disturb} if disturb and i == 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], printed


@pytest.fixture(scope="module")
def stopped(folder):
    """A run of two processes after a signal to the second one: exit statuses and what they printed."""
    result = _run_two(folder, "SIGTERM 3")
    shutil.copytree(folder / "runs" / "two", folder / "runs" / "other")
    return result


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_together_they_end_as_one_device(folder, stopped):
    statuses, printed = stopped
    assert statuses == [143, 143], printed
    assert all("plain is saved after step 3 of 10" in text for text in printed)
    checkpoints = folder / "runs" / "two" / "checkpoints" / "plain"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "3"]
    assert [damage(path) for path in checkpoints.iterdir()] == [None, None]

    statuses, printed = _run_two(folder)
    assert statuses == [0, 0], printed
    assert "going on after step 3 of 10" in printed[0]
    assert "epoch" not in printed[1]  # the first one speaks
    _assert_ends_as_on_one_device(folder, "two")
    assert qpde.load(folder / "runs" / "two" / "plain").model.bits == Bits(None, None)  # of other devices than here


def test_what_two_processes_began_goes_on_on_four_devices_of_one_when_told_and_ends_as_on_one(folder, stopped, run):
    status, printed = run("other", "--devices", "4")
    assert (status, "devices: 'all' there, 4 now" in printed) == (2, True)
    status, printed = run("other", "--devices", "4", "--resume-changed")
    assert status == 0, printed
    assert "going on after step 3 of 10" in printed
    _assert_ends_as_on_one_device(folder, "other")


def test_alone_a_process_agrees_with_itself():
    assert from_first(lambda: 3) == 3
    assert largest(2) == 2
    with pytest.raises(FileExistsError):
        from_first(lambda: (_ for _ in ()).throw(FileExistsError()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto", 2, None), "found by themselves with --distributed auto"),
        (("host:1", 2, 2), r"needs --processes \(=2\) and --process \(=2\), from 0 to one less"),
        (("host:1",), "needs --processes"),
        (("auto",), "do not find each other"),
    ],
)
def test_processes_that_cannot_find_each_other_are_told_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        join(*arguments)


# Compiled programs


@pytest.fixture
def unchosen():
    """JAX without a folder for compiled programs."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache_unless_jax_was_told_otherwise(unchosen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled_programs() is None
    jax.config.update("jax_enable_compilation_cache", True)
    assert keep_compiled_programs() == tmp_path / "qpde" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "qpde" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_no_compiled_programs_are_kept_where_the_users_cache_cannot_be_written(unchosen, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
