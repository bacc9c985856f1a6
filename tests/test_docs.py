"""The site: its reference names everything that is public, and its pages hold only code that Python reads."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import qpde

DOCS = Path(__file__).parent.parent / "docs"
ROOMS = sorted(path.stem for path in (DOCS / "api").glob("*.md") if path.stem != "index")


def public_names(room: str) -> list[str]:
    return list(importlib.import_module(f"qpde.{room}").__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_lists_every_public_name_of_a_room(room):
    page = (DOCS / "api" / f"{room}.md").read_text()
    listed = re.findall(r"^   (\w+)$", page, re.MULTILINE)
    assert listed == public_names(room)
    assert f".. automodule:: qpde.{room}" in page


def test_every_room_that_users_meet_has_a_page():
    rooms = {name for name in qpde.__all__ if inspect.ismodule(getattr(qpde, name))}
    assert rooms <= set(ROOMS)
    assert {"bits", "deploy", "plots", "trained"} <= set(ROOMS)


def test_the_reference_leads_to_every_page():
    text = (DOCS / "api" / "index.md").read_text()
    (tree,) = re.findall(r"```\{toctree\}\n:maxdepth: 1\n\n(.*?)```", text, re.DOTALL)
    assert sorted(tree.split()) == ROOMS


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_code_of_a_page_is_python(path):
    fenced = r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```"
    for code in re.findall(fenced, path.read_text(), re.DOTALL | re.MULTILINE):
        ast.parse(code)
