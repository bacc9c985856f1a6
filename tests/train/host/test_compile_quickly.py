"""Flags for a command that compiles much and runs little."""

import importlib.util
import os

import pytest

from train.host.compilation_cache import compile_quickly


@pytest.fixture
def without_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # restored afterwards, whatever was written
    monkeypatch.delenv("XLA_FLAGS")


def test_programs_for_processors_are_hardly_optimized(without_flags, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compile_quickly()
    assert "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]


def test_the_user_s_flags_and_accelerators_keep_theirs(without_flags, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "jax_plugins" else None)
    compile_quickly()
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    compile_quickly()
    assert os.environ["XLA_FLAGS"] == "--mine"
