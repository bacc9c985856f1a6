"""Experiments as JSON text, for a run's config.json."""

import dataclasses
import json
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from train.config import Experiment
from train.nodes.config import GraphExperiment

KINDS = {"images": Experiment, "graph": GraphExperiment}
"""Every kind of experiment, by the name that its JSON text carries."""


def to_json(experiment: Experiment | GraphExperiment) -> str:
    """The experiment as JSON text; `from_json` reads it back to an equal value."""
    (kind,) = [name for name, cls in KINDS.items() if isinstance(experiment, cls)]
    return json.dumps({"kind": kind} | dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str) -> Experiment | GraphExperiment:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: not JSON, an unknown or missing field, or a value that is out of its range.
    """
    try:
        values = json.loads(text)
        experiment = _build(KINDS[values.pop("kind")], values)
        hints = get_type_hints(type(experiment.model))
        variants = tuple(
            dataclasses.replace(v, changes={name: _build(hints[name], change) for name, change in v.changes.items()})
            for v in experiment.variants
        )
        return dataclasses.replace(experiment, variants=variants)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not an experiment of this version: {error}") from error


def _build(hint: Any, value: Any) -> Any:
    """`value`, made of JSON's lists and objects, as the tuples and dataclasses that the annotation asks for."""
    if get_origin(hint) in (Union, types.UnionType):
        return None if value is None else _build(next(h for h in get_args(hint) if h is not type(None)), value)
    if get_origin(hint) is tuple:
        return tuple(_build(get_args(hint)[0], item) for item in value)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            raise TypeError(f"unknown fields {unknown}")
        return hint(**{name: _build(hints[name], item) for name, item in value.items()})
    return value
