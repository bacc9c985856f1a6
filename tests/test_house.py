"""The house: what a newcomer installs works as the README says, and the rooms keep their walls."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import venv
from graphlib import TopologicalSorter
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parent.parent

# The order of the rooms, from the ground up. A room knows the floors below its own, and no room beside it.
FLOORS = {
    "qpde": """
        batches bits checks devices files native pictures suggestions
        quantizers stencils operators integrators graphs norms kernel_norms plots
        datasets models
        measure certify nn trained
        ptq testing predictions description deploy overlays
        cli
    """,
    "train": """
        host config
        steps
        data runs
        loop
        tasks
        trained
        page
        commands
        __main__
    """,
}


def name_of(path: Path) -> str:
    """Dotted name of the module that a file holds; of an `__init__.py`, its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions and for the type checker too: `from a import b` as
    a.b, relative ones as what they stand for.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = path.parent.parts[len(ROOT.parts) : len(path.parent.parts) + 1 - node.level] if node.level else ()
            module = ".".join([*here, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def arrows(package: str) -> dict[str, set[str]]:
    """For every module of a package those of the same package that it imports."""
    files = {name_of(path): path for path in (ROOT / package).rglob("*.py")}

    def module_of(name: str) -> str:  # without the name of what is taken from it
        return name if name in files else module_of(name.rpartition(".")[0])

    ours = {module: [name for name in imports(path) if name.split(".")[0] == package] for module, path in files.items()}
    return {module: {module_of(name) for name in names} for module, names in ours.items()}


def room_of(module: str) -> str:
    """A package's child: qpde.models.images.blocks stands in the room models. The package itself is the roof."""
    return module.split(".")[1] if "." in module else "the roof"


def readme_example() -> str:
    """The library example of the README: its only block of Python."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return example


@pytest.mark.parametrize("package", FLOORS)
def test_no_module_imports_itself_by_way_of_others(package):
    tuple(TopologicalSorter(arrows(package)).static_order())  # CycleError names the circle


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_only_what_stands_on_a_lower_floor(package):
    floors = [floor.split() for floor in FLOORS[package].strip().splitlines()] + [["the roof"]]
    number = {room: i for i, floor in enumerate(floors) for room in floor}
    pairs = {(room_of(module), room_of(target)) for module, targets in arrows(package).items() for target in targets}
    homeless = {room_of(module) for module in arrows(package)} - number.keys()
    assert not homeless, "give it a floor in the table above"
    assert not {f"{room} -> {other}" for room, other in pairs if room != other and number[other] >= number[room]}


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


DOCUMENTED = sorted({room_of(name_of(path)) for path in (ROOT / "qpde").rglob("*.py")} - {"the roof"})
"""Rooms whose docstrings name every argument in an entry of its own: all of them."""


@pytest.mark.parametrize("room", DOCUMENTED)
def test_a_documentation_parser_finds_every_parameter(room):
    """Of functions that a room exports, and of methods that list their arguments."""
    module, lost = importlib.import_module(f"qpde.{room}"), {}
    for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
        value = getattr(module, name)
        if not getattr(value, "__module__", "").startswith(module.__name__):
            continue
        methods = vars(value).items() if inspect.isclass(value) else ()
        functions = {name: value} if inspect.isfunction(value) else {f"{name}.{key}": f for key, f in methods}
        for called, function in functions.items():
            text = inspect.getdoc(function) or ""
            if inspect.isfunction(function) and (function is value or "Args:" in text):
                sections = griffe.Docstring(text, lineno=1).parse("google", warnings=False)
                entries = [s.value for s in sections if s.kind is griffe.DocstringSectionKind.parameters]
                found = {entry.name.lstrip("*") for section in entries for entry in section}
                lost[called] = set(inspect.signature(function).parameters) - found - {"self", "cls"}
    assert not {called: names for called, names in lost.items() if names}


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
    installed = {package["name"].lower() for package in json.loads(run(*pip, "list", "--format=json"))}
    assert {"qpde", "jax", "flax"} <= installed
    # jax brings scipy along, flax optax and orbax; what the application and the tests need besides stays away.
    assert not installed & {"tensorflow-datasets", "grain", "tyro", "scikit-learn", "matplotlib", "pytest"}
    (tmp_path / "example.py").write_text(readme_example())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    printed = run(python, "-I", tmp_path / "example.py", cwd=tmp_path, env=environment)
    assert "total" in printed
    assert "agree" in printed
