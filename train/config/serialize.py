"""Experiments as JSON text, for a run's config.json."""

import contextlib
import dataclasses
import json
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qpde.suggestions import did_you_mean
from train.config.graphs import GraphExperiment
from train.config.images import Experiment
from train.config.segmentation import SegmentationExperiment

EXPERIMENTS = {"images": Experiment, "segmentation": SegmentationExperiment, "graph": GraphExperiment}
"""Every kind of experiment, by the name that its JSON text carries."""


def to_json(experiment: Experiment | GraphExperiment) -> str:
    """The experiment as JSON text; `from_json` reads it back to an equal value."""
    (kind,) = [name for name, cls in EXPERIMENTS.items() if type(experiment) is cls]
    return json.dumps({"kind": kind} | dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str) -> Experiment | GraphExperiment:
    """Read what `to_json` wrote.

    Raises:
      ValueError: not JSON, an unknown or missing field, or a value that is out of its range.
    """
    try:
        values = json.loads(text)
        experiment = _build(EXPERIMENTS[values.pop("kind")], values)
        hints = get_type_hints(type(experiment.model))
        variants = tuple(
            dataclasses.replace(
                v, changes={name: _build(hints[name], change, name) for name, change in v.changes.items()}
            )
            for v in experiment.variants
        )
        return dataclasses.replace(experiment, variants=variants)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not an experiment of this version: {error}") from error
    except RecursionError as error:
        raise ValueError("not an experiment of this version: it is nested too deeply") from error


def _build(hint: Any, value: Any, name: str = "the text") -> Any:
    """`value`, made of JSON's lists and objects, as the tuples and dataclasses that the annotation asks for.

    Raises:
      TypeError: it is of another type; names it.
      ValueError: a dataclass refuses it.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        possible = [one for one in arguments if (one is types.NoneType) == (value is None)] or list(arguments)
        if len(possible) == 1:
            return _build(possible[0], value, name)
        for one in possible:
            with contextlib.suppress(TypeError):
                return _build(one, value, name)
        raise TypeError(f"{name} (={value!r}) must be {_described(hint)}")
    if not _fits(hint, value):
        raise TypeError(f"{name} (={value!r}) must be {_described(hint)}")
    if origin is tuple:
        return tuple(_build(arguments[0], item, name) for item in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            raise TypeError(f"unknown fields {unknown}: {did_you_mean(unknown[0], hints)}choose from {list(hints)}")
        return hint(**{name: _build(hints[name], item, name) for name, item in value.items()})
    return value


def _described(hint: Any) -> str:
    """What the annotation admits, in words."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, arguments))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value of JSON can stand for the type, no union, that the annotation names."""
    origin = get_origin(hint)
    if origin is Literal or hint is Any:
        return hint is Any or value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, dict if dataclasses.is_dataclass(hint) else list if origin is tuple else origin or hint)
