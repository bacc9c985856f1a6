"""The high-precision twin with activation clips of its own: shared weights, a second set of clips beside them.

The second set is a part of the parameters, under the name `TWIN`, with the paths of the first; so optimizer, rules,
guards and checkpoints treat it as they treat every other parameter.
"""

from typing import Any

Params = dict[str, Any]

TWIN = "twin_clips"
_CLIPS = "act_clips"


def add_twin(params: Params) -> Params:
    """Parameters with a second set of activation clips, equal to the first."""
    return params | {TWIN: _clips(params)}


def has_twin(params: Params) -> bool:
    """Whether there is a second set."""
    return TWIN in params


def low(params: Params) -> Params:
    """What the quantized network takes."""
    return {name: value for name, value in params.items() if name != TWIN}


def high(params: Params) -> Params:
    """What its twin takes: the same with the second set of clips."""
    return _replaced(low(params), params[TWIN])


def _clips(tree: Params) -> Params:
    """The part of the tree that leads to activation clips."""
    found = {}
    for name, value in tree.items():
        if name == _CLIPS:
            found[name] = value
        elif isinstance(value, dict) and (inner := _clips(value)):
            found[name] = inner
    return found


def _replaced(tree: Params, new: Params) -> Params:
    return tree | {k: _replaced(tree[k], v) if isinstance(v, dict) else v for k, v in new.items()}
