"""TensorBoard's events are the lines of metrics.jsonl, also after an interruption, and need a package that says so."""

import sys

import pytest

from train.config.images import Experiment, Variant
from train.runs.directory import open_run

EXPERIMENT = Experiment(name="example", variants=(Variant("a"), Variant("b")))


def _line(variant, epoch, **metrics):
    return {"variant": variant, "epoch": epoch, "step": 5 * epoch, "weight_bits": None, **metrics}


def _events(folder):
    """(tag, epoch) -> value of all files of a folder; each may be there once."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.glob("events.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its check sum (4), the event, its check sum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    return found


def test_the_events_are_the_lines_of_the_metrics_also_after_an_interruption(tmp_path):
    pytest.importorskip("tensorboardX", reason="the [tensorboard] extra is not installed")
    with open_run(tmp_path, EXPERIMENT, tensorboard=True) as run:
        run.forget_after("a", 0)
        run.log(**_line("a", 1, train_loss=2.5))
        run.log(**_line("a", 2, train_loss=9.0))  # its state is not saved: the run is killed here
    with open_run(tmp_path, EXPERIMENT, tensorboard=True) as run:
        run.forget_after("a", 1)
        run.log(**_line("a", 2, train_loss=1.5))
        run.log(**_line("b", 1, accuracy=[0.25, 0.75], collapsed_clips=3))
    folder = tmp_path / "example" / "tensorboard"
    assert _events(folder / "a") == {("train_loss", 1): 2.5, ("train_loss", 2): 1.5}
    assert _events(folder / "b") == {("accuracy", 1): 0.5, ("collapsed_clips", 1): 3.0}


def test_without_the_extra_nothing_is_written_and_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"install the \[tensorboard\] extra"):
        open_run(tmp_path, EXPERIMENT, tensorboard=True)
    assert list(tmp_path.iterdir()) == []
    with open_run(tmp_path, EXPERIMENT) as run:
        run.log(**_line("a", 1, train_loss=1.0))
    assert not (tmp_path / "example" / "tensorboard").exists()
