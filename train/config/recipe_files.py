"""Files of configs/: Python that defines `recipes`, and what is wrong with one in a single line."""

import dataclasses
import re
import runpy
import traceback
from collections.abc import Iterable
from pathlib import Path

from qpde.suggestions import did_you_mean
from train.config import graphs, images, segmentation
from train.config.graphs import GraphExperiment
from train.config.images import Experiment
from train.config.serialize import EXPERIMENTS, from_json, to_json


def load_recipes(path: Path) -> dict[str, Experiment] | dict[str, GraphExperiment]:
    """Read the recipes that a file of configs/ defines, the default first.

    Args:
      path: The file, which is run.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no Python file, it fails, it exits, or its `recipes` are none. Names the line.
    """
    if not path.is_file():
        meant = did_you_mean(path.name, [file.name for file in path.parent.glob("*.py")])
        raise FileNotFoundError(f"there is no experiment file {path}: {meant}examples are in configs/")
    if path.suffix != ".py":
        raise ValueError(f"{path} is no Python file: experiments are .py files that define `recipes`, see configs/")
    try:
        recipes = runpy.run_path(str(path)).get("recipes")
    except (Exception, SystemExit) as error:  # whatever the file does
        raise ValueError(_fault(path, error)) from error
    kinds = tuple(EXPERIMENTS.values())
    if not (isinstance(recipes, dict) and recipes and all(type(recipe) in kinds for recipe in recipes.values())):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path} must define `recipes`, a dictionary from names to {names}")
    for name, recipe in recipes.items():
        try:
            from_json(to_json(recipe))  # dataclasses do not check the types of what they are given
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, recipe {name!r}: {error}") from error
    return recipes


def _fault(path: Path, error: BaseException) -> str:
    """The file, the line in it that failed last, and why."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}".rstrip(": ")
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if Path(frame.f_code.co_filename).resolve() == path.resolve()
    ]
    if isinstance(error, OSError) and not frames:
        return f"{path} cannot be read: {error.strerror}"
    place, names = str(path), {}
    if frames:
        frame, line = frames[-1]
        place, names = f"{path}, line {line}", frame.f_globals
    if isinstance(error, SystemExit):
        return f"{place}: the file exits instead of defining `recipes`"
    return f"{place}: {_reason(error, names)}"


def _reason(error: BaseException, names: Iterable[str]) -> str:
    """One line, with what was meant where a name or a field is misspelled."""
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        name, word = unknown.groups()
        cls = next((getattr(module, name) for module in (images, segmentation, graphs) if hasattr(module, name)), None)
        if cls is not None:
            fields = [field.name for field in dataclasses.fields(cls)]
            return f"{name} has no field {word!r}: {did_you_mean(word, fields)}choose from {fields}"
    if type(error) is ValueError:  # of our own checks, a sentence by itself
        return str(error)
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    if isinstance(error, NameError) and (meant := did_you_mean(error.name or "", names)):
        return f"{reason}: {meant}".rstrip()
    return reason
