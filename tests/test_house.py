"""The house: what a newcomer installs works as the README says, and the rooms keep their walls."""

import ast
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIBLINGS = ("quantizers", "stencils", "operators", "integrators", "graphs")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(module: str) -> set[str]:
    """What a room of one file or of several imports."""
    path = ROOT / "qpde" / module
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return set().union(*(imports(file) for file in files))


def readme_example() -> str:
    """The library example of the README: its only block of Python."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return example


@pytest.mark.parametrize("module", SIBLINGS)
def test_a_room_of_one_idea_imports_no_sibling(module):
    siblings = {f"qpde.{other}" for other in SIBLINGS if other != module}
    assert not {name for name in rooms(module) if any(s in name for s in siblings)}


def test_the_library_never_imports_the_application():
    for path in (ROOT / "qpde").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("train", "configs")}, path


def test_the_application_never_reaches_into_a_private_name_of_the_library():
    for path in (ROOT / "train").rglob("*.py"):
        private = {n for n in imports(path) if n.startswith("qpde") and any(p.startswith("_") for p in n.split("."))}
        assert not private, path


def test_every_public_function_says_what_it_computes():
    missing = []
    for path in (ROOT / "qpde").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            is_public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                missing.append(f"{path.name}:{node.name}")
    assert not missing


def test_the_wheel_alone_runs_the_readme_example(tmp_path):
    def run(*command, **options):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("qpde-*.whl")
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-compile", wheel)  # little of what is installed is imported here
    installed = run(*pip, "list")
    assert "qpde" in installed
    for extra in ("optax-", "scikit-learn", "matplotlib", "pytest"):
        assert extra not in installed
    (tmp_path / "example.py").write_text(readme_example())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    printed = run(python, "-I", tmp_path / "example.py", cwd=tmp_path, env=environment)
    assert "total" in printed
    assert "agree" in printed
