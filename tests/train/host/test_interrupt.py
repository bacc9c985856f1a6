"""Ctrl-C as a person presses it: once, early, or several times within moments."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.data.reader import _begin_worker
from train.host.interrupt import StopRequest, end_at_once

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def interruptible():
    """A background job of a shell ignores SIGINT, and its children with it: the tests are not to depend on that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _python(*arguments):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("moment", ["jax", "train.commands.cli", "never"])
def test_ctrl_c_while_the_program_starts_ends_it_quietly(moment, tmp_path):
    """The signal comes in the midst of the import of a module, which takes the most part of the first seconds."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import importlib.abc, os, signal, sys

class Press(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {moment!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press())
"""
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if moment == "never":
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_the_first_ctrl_c_is_noted_and_the_second_ends_the_program_at_once_and_quietly():
    program = """
import os, signal, sys
from train.host.interrupt import StopRequest, end_at_once
end_at_once()
with StopRequest() as stop:
    signal.raise_signal(signal.SIGINT)
    print(stop.signal_number, flush=True)
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
    print("still here")
"""
    process = _python("-c", program)
    printed, errors = process.communicate()
    assert (process.returncode, printed, errors) == (-signal.SIGINT, "2\n", "")


def test_after_the_first_signal_handlers_are_what_they_were():
    program = """
import signal
from train.host.interrupt import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)
with StopRequest() as stop:
    print(stop.signal_number)
    signal.raise_signal(signal.SIGINT)
    print(stop.signal_number)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("raised")
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""
    process = _python("-c", program)
    printed, errors = process.communicate()
    assert (process.returncode, printed, errors) == (0, "None\n2\nraised\nTrue\n", "")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "sysv_signal"), reason="the C library has no handlers for one signal"
)
def test_two_ctrl_c_end_the_program_while_python_hears_of_none():
    """As in a compiler: the main thread is in a function of C that no signal interrupts."""
    program = """
import ctypes, os, signal, threading, time
from train.host.interrupt import StopRequest, end_at_once
end_at_once()

def press():
    for _ in range(2):
        time.sleep(0.2)
        print("pressed", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

with StopRequest():
    threading.Thread(target=press).start()
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)  # waits for itself, and no signal ends that
print("still here")
"""
    process = _python("-c", program)
    try:
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, printed, errors) == (-signal.SIGINT, "pressed\npressed\n", "")


def test_an_ignored_ctrl_c_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_at_once()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signal_number is None


def _work(connection):
    _begin_worker(0, 1)
    connection.send(os.getpid())
    time.sleep(60)


def _parent(connection):
    """A process that starts a worker and is killed before it can end it."""
    multiprocessing.get_context("spawn").Process(target=_work, args=(connection,), daemon=True).start()
    time.sleep(60)


def test_a_worker_leaves_ctrl_c_to_its_parent_and_ends_with_it():
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    parent = context.Process(target=_parent, args=(theirs,))
    parent.start()
    worker = mine.recv()
    os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.join()
    for _ in range(100):
        if not _runs(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def _runs(process):
    """Whether it is there and no zombie, which nobody has waited for."""
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
