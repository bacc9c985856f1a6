"""Runs that are small enough for a test."""

import pytest
from tiny_runs import CONFIG

from qpde.models import Architecture, registry
from qpde.models.images.blocks import BasicBlock


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A file of recipes for a network of two blocks, in a fresh folder that is also the working directory."""
    architecture = Architecture("tiny", BasicBlock, ((8, 8, 2, 1, 1),))
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny", architecture)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    return "tiny.py"
