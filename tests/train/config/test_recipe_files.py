"""Files of experiments: what is wrong with one is a line that names it, its line and the reason."""

import pytest

from train.commands.cli import main
from train.config.recipe_files import load_recipes

GOOD = """from train.config import Experiment, Model, Optimizer, Variant

recipes = {"fast": Experiment("a", (Variant("plain"),), model=Model("resnet20"), optimizer=Optimizer())}
"""

FAULTS = {
    "a syntax error": ("x = 1\nrecipes = 3 4\n", "tiny.py, line 2: invalid syntax: recipes = 3 4"),
    "an undefined name": (
        GOOD.replace("model=Model", "model=Modl"),
        "tiny.py, line 3: NameError: name 'Modl' is not defined: did you mean 'Model'?",
    ),
    "an unknown field": (
        GOOD.replace('Model("resnet20"', 'Model("resnet20", symetric=True'),
        "tiny.py, line 3: Model has no field 'symetric': did you mean 'symmetric'? choose from [",
    ),
    "an unknown field of the experiment": (
        GOOD.replace("model=", "modle="),
        "tiny.py, line 3: Experiment has no field 'modle': did you mean 'model'? choose from ['name', ",
    ),
    "an unknown change": (
        GOOD.replace('Variant("plain")', 'Variant("plain", {"symetric": True})'),
        "tiny.py, line 3: variant 'plain' changes ['symetric'], which are no fields of the model: did you mean "
        "'symmetric'? ",
    ),
    "a value out of its range": (
        GOOD.replace("Optimizer()", "Optimizer(learning_rate=-1)"),
        "tiny.py, line 3: optimizer.learning_rate (=-1) must be positive and finite",
    ),
    "a missing import": (
        "import json\nimport absent_package\n",
        "tiny.py, line 2: ModuleNotFoundError: No module named 'absent_package'",
    ),
    "an import of a missing name": (
        "from train.config import Experimnt\n",
        "tiny.py, line 1: ImportError: cannot import name 'Experimnt' from 'train.config'",
    ),
    "an exit": ("import sys\n\n\nsys.exit()\n", "tiny.py, line 4: the file exits instead of defining `recipes`"),
    "an error of its own": ("def f():\n    return 1 / 0\n\nf()\n", "tiny.py, line 2: ZeroDivisionError: division by"),
    "a null byte": ("x = 1\0\n", "tiny.py"),
    "no recipes": (
        "x = 1\n",
        "tiny.py must define `recipes`, a dictionary from names to Experiment or ",
    ),
    "a type": (GOOD.replace('"a", ', '"a", epochs=3.5, variants='), "tiny.py, recipe 'fast': not an experiment of "),
    "a choice": (
        GOOD.replace("Optimizer()", 'Optimizer("adamm")'),
        "name (='adamm') must be 'sgd' or 'adam' or 'adamw'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_one_line_of_file_line_and_reason_and_status_2(fault, tmp_path, monkeypatch, capsys):
    text, message = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(text)
    assert main(["run", "tiny.py"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: tiny.py")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize("name", ["tiny.yaml", "tiny.png", "tiny"])
def test_what_is_no_python_file_is_refused_as_such(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"\x89PNG: 1\n")
    assert main([command, name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name} is no Python file: experiments are .py files")


def test_bytes_that_are_no_text_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    assert main(["run", "tiny.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tiny.py")
    assert error.count("\n") == 1


def test_a_fault_in_a_file_that_is_imported_names_that_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_part_of_recipes.py").write_text("x = (\n")
    (tmp_path / "tiny.py").write_text("import shared_part_of_recipes\n")
    assert main(["run", "tiny.py"]) == 2
    assert "shared_part_of_recipes.py, line 1: '(' was never closed" in capsys.readouterr().err


def test_ctrl_c_while_a_file_runs_is_no_fault_of_the_file(tmp_path):
    (tmp_path / "tiny.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_recipes(tmp_path / "tiny.py")


def test_a_good_file_is_read(tmp_path):
    (tmp_path / "tiny.py").write_text(GOOD)
    assert list(load_recipes(tmp_path / "tiny.py")) == ["fast"]
