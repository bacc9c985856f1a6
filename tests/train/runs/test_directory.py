"""The folder of a run: what the program can leave behind, it takes up or overwrites; nothing else is touched."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qpde
from qpde.models import Architecture, image_network
from qpde.models.images.blocks import BasicBlock
from qpde.trained import weights_digest
from train.commands.quantize import Quantize, prepare_quantize
from train.commands.reproduce import Reproduce, prepare_reproduce
from train.config.images import Experiment, Model, Variant
from train.config.serialize import to_json
from train.runs.checkpoints import Checkpoints
from train.runs.directory import open_run, read_lines, read_results, start_changes, unfinished

EXPERIMENT = Experiment(name="run", variants=(Variant("plain"),))

MODEL = image_network(
    Architecture("tiny", BasicBlock, ((4, 4, 1, 1, 1),)), num_classes=2, weight_bits=None, act_bits=None
)
VARIABLES = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _finished(folder):
    """A run with everything that one has."""
    with open_run(folder, EXPERIMENT) as run:
        run.log(variant="plain", epoch=1, step=5)
        run.checkpoints("plain").mkdir(parents=True)
        (run.checkpoints("plain") / "state").write_text("1")
        run.finish({"variants": {"plain": {"accuracy": 1.0}}})
    return run.path


# What an end at any moment leaves


def _killed(monkeypatch, count):
    """Every change of a file from number `count` on fails, as the disk's end or a kill would have it."""
    left = [count]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return call

    for name in ("replace", "unlink", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr("shutil.rmtree", counted(shutil.rmtree))
    return left


@pytest.mark.parametrize("experiment", [EXPERIMENT, dataclasses.replace(EXPERIMENT, epochs=3)], ids=["same", "other"])
def test_an_overwrite_that_ends_at_any_moment_is_done_by_the_same_command_again(tmp_path, experiment):
    count, over = 0, False
    while not over:
        folder = tmp_path / str(count)
        path = _finished(folder)
        whole = _files(path)
        with pytest.MonkeyPatch.context() as patch:
            left = _killed(patch, count)
            try:
                open_run(folder, experiment, overwrite=True).__exit__()
            except OSError as error:
                assert error.errno == 28  # noqa: PT017
            over = left[0] >= 0
        # Nobody takes a part of the old run for a whole one.
        assert over or (path / "config.json").exists() == (_files(path) == whole)
        with open_run(folder, experiment, overwrite=True) as run:
            assert sorted(_files(path)) == [".lock", "config.json"]
            assert run.changes == []
        count += 1
    assert count > 5


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "config.json.part"], ["config.json.part", "start.json"]])
def test_a_run_that_ended_before_it_began_is_taken_up(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("{")
    with open_run(tmp_path, EXPERIMENT) as run:
        assert (run.path / "config.json").read_text() == to_json(EXPERIMENT)


@pytest.mark.parametrize("options", [{}, {"resume_changed": True}])
def test_what_is_left_of_a_run_is_overwritten_when_told(tmp_path, options):
    path = _finished(tmp_path)
    (path / "config.json").unlink()
    (path / "summary.json").unlink()
    before = _files(path)
    with pytest.raises(FileExistsError, match=r"holds what is left of a run, without its config.json.*--overwrite"):
        open_run(tmp_path, EXPERIMENT, **options)
    assert _files(path) == before
    open_run(tmp_path, EXPERIMENT, overwrite=True).__exit__()
    assert sorted(_files(path)) == [".lock", "config.json"]


def test_a_folder_that_never_was_a_run_is_never_overwritten(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds something that is not a run"):
            open_run(tmp_path, EXPERIMENT, overwrite=overwrite)
    assert _files(tmp_path) == {"run/notes.txt": b"mine"}


# Links


def test_checkpoints_that_are_a_link_are_used_and_overwriting_leaves_where_it_leads(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").mkdir()
    with open_run(tmp_path, EXPERIMENT) as run:
        (run.path / "checkpoints").symlink_to(disk)
        with Checkpoints(run.checkpoints("plain")) as checkpoints:
            checkpoints.save(1, {"a": jnp.ones(2)})
    assert (disk / "plain" / "1").is_dir()
    with Checkpoints(tmp_path / "run" / "checkpoints" / "plain") as checkpoints:
        assert checkpoints.last_step == 1
    open_run(tmp_path, EXPERIMENT, overwrite=True).__exit__()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (disk / "plain" / "1").is_dir()


@pytest.mark.parametrize("place", ["runs", "runs/run", "runs/run/checkpoints"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, place, kind):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith("checkpoints"):
        open_run(tmp_path / "runs", EXPERIMENT).__exit__()
    if kind == "link":
        (tmp_path / place).symlink_to("nowhere")
    else:
        (tmp_path / place).write_text("")
    message = "is a link to nowhere, which is not there" if kind == "link" else "is not a folder"
    with pytest.raises(FileExistsError, match=f"{tmp_path / place} {message}.*choose another --name"):
        open_run(tmp_path / "runs", EXPERIMENT)
    assert os.path.lexists(tmp_path / place)


# Damaged files


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"variant": "plain\xff", "epoch": 1}', "can't decode byte 0xff"),
        (b'{"epoch": 1}', 'it has no "variant" or no "epoch"'),
        (b'{"variant": "plain"}', 'it has no "variant" or no "epoch"'),
        (b'{"variant": 1, "epoch": 1}', 'it has no "variant"'),
        (b"[1]", 'it has no "variant"'),
        (b"[" * 100_000, "recursion depth"),
        (b"\0\0\0\0", "Expecting value"),
        (b"", "Expecting value"),
    ],
)
def test_a_damaged_line_is_named_before_anything_is_written(tmp_path, line, reason):
    with open_run(tmp_path, EXPERIMENT) as run:
        run.log(variant="plain", epoch=1)
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(line + b'\n{"variant": "plain", "epoch": 2}\n{"cut sho')
    before = _files(run.path)
    for read in (lambda: read_lines(run.path), lambda: open_run(tmp_path, EXPERIMENT)):
        with pytest.raises(OSError, match=rf"metrics.jsonl, line 2, is damaged \(.*{reason}.*\): delete that line"):
            read()
    assert _files(run.path) == before


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"variants": []}', '{"variants": {"a": 1}}', '{"variants": ' + "[" * 100_000]
)
def test_a_damaged_summary_says_how_to_have_it_again(tmp_path, text):
    path = _finished(tmp_path)
    (path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary.json is unreadable \(.*\): delete it, and the command that made"):
        read_results(path)


# Runs made from others


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A full-precision run in the middle of its training, and what trains it on and finishes it."""
    monkeypatch.chdir(tmp_path)
    full = Experiment("full", (Variant("plain"),), model=Model(weight_bits=None, act_bits=None))
    with open_run(tmp_path / "runs", full) as run:
        pass

    def train(step, *, finish):
        variables = {**VARIABLES, "params": jax.tree.map(lambda leaf: leaf + step, VARIABLES["params"])}
        qpde.save(run.path / "plain", MODEL, variables)
        if finish:
            run.finish({"variants": {"plain": {}}})

    train(5, finish=False)
    return train


def test_an_unfinished_run_is_not_quantized(source):
    with pytest.raises(FileNotFoundError, match=r"runs/full holds no finished run: it has no summary.json"):
        prepare_quantize(Quantize(Path("runs/full"), ("4",)))


def test_a_run_made_from_another_records_its_state_and_notices_when_that_has_changed(source, tmp_path):
    derived = dataclasses.replace(EXPERIMENT, start_from="runs/full", epochs=0)
    with open_run(tmp_path / "runs", derived) as run:
        recorded = json.loads((run.path / "start.json").read_text())
    assert recorded == {"plain": weights_digest(tmp_path / "runs/full/plain")}
    open_run(tmp_path / "runs", derived).__exit__()  # nothing has changed: it is taken up
    assert unfinished(tmp_path / "runs", [derived], advice="") == [derived]
    run.finish({"variants": {}})
    assert unfinished(tmp_path / "runs", [derived], advice="") == []

    source(10, finish=True)
    what = "network runs/full/plain: '[0-9a-f]*' there, '[0-9a-f]*' now"
    with pytest.raises(FileExistsError, match=f"another experiment \\({what}\\): do so"):
        unfinished(tmp_path / "runs", [derived], advice="do so")
    with pytest.raises(ValueError, match="cannot be repeated: network runs/full/plain was "):
        prepare_reproduce(Reproduce(run.path))
    (run.path / "summary.json").unlink()
    with pytest.raises(FileExistsError, match=f"{what}.*--overwrite"):
        open_run(tmp_path / "runs", derived)
    with open_run(tmp_path / "runs", derived, resume_changed=True) as run:
        assert len(run.changes) == 1
    assert start_changes(run.path, derived) == {}
    assert "network runs/full/plain" in (run.path / "config_history.jsonl").read_text()


def test_a_start_that_is_gone_or_was_never_recorded_has_not_changed(source, tmp_path):
    derived = dataclasses.replace(EXPERIMENT, start_from="runs/full", epochs=0)
    with open_run(tmp_path / "runs", derived) as run:
        (tmp_path / "runs" / "full").rename(tmp_path / "elsewhere")
        assert start_changes(run.path, derived) == {}
        (tmp_path / "elsewhere").rename(tmp_path / "runs" / "full")
        (run.path / "start.json").unlink()
        assert start_changes(run.path, derived) == {}
