"""What a layer of a user's own network rounds, and which rule of a list says so."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from qpde.bits import LARGEST_BITS, SMALLEST_BITS
from qpde.models.options import Smoothing
from qpde.quantizers import LEVEL_SETS

__all__ = ["LayerQuantizers", "Rule", "check_rules", "first_match"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerQuantizers:
    """Quantizers of one layer: its kernel's, and that of its input.

    Attributes:
      weights: Bits of the kernel, 2 to 32. None: exact, where a call gives no others.
      activations: Bits of the input, 2 to 32. None: exact, where a call gives no others.
      smoothing: Total-variation smoothing of the input before its quantizer, for maps (..., H, W, C).
      levels: "uniform", "pot" or "apot", see `qpde.quantizers.quantize_weight`.
      signed: Whether the input can be negative. "auto" asks the data: `QuantizedModule.with_signs` decides it.
      per_channel: A clip for each output channel of the kernel, instead of one for the kernel.
      standardize: Give the kernel mean 0 and variance 1 before it is rounded, as the published networks do. This
        changes the layer's function, so it is for networks that are trained with it.
    """

    weights: int | None = None
    activations: int | None = None
    smoothing: Smoothing | None = None
    levels: str = "uniform"
    signed: bool | str = "auto"
    per_channel: bool = False
    standardize: bool = False

    def __post_init__(self):
        for name in ("weights", "activations"):
            bits = getattr(self, name)
            if bits is not None and not (SMALLEST_BITS <= bits <= LARGEST_BITS and bits == int(bits)):
                raise ValueError(f"{name} (={bits}) must be a whole number of bits from 2 to 32, or None for exact")
        if self.levels not in LEVEL_SETS:
            raise ValueError(f"unknown levels {self.levels!r}: choose one of {', '.join(LEVEL_SETS)}")
        if self.signed not in (True, False, "auto"):
            raise ValueError(f"signed (={self.signed!r}) must be True, False or 'auto'")
        if self.smoothing is not None and (self.smoothing.blocks is not None or self.smoothing.output):
            raise ValueError("smoothing of a layer has neither `blocks` nor `output`: they belong to whole networks")


@dataclasses.dataclass(frozen=True)
class Rule(LayerQuantizers):
    """Quantizers for the layers whose path matches.

    A path is that of the layer's parameters, such as "encoder/Conv_0".

    Attributes:
      pattern: Regular expression that is searched for in the path. The first matching rule of a list decides.
      leave_alone: Keep the layer as it is, whatever the bits of a call.

    >>> rules = [Rule("head", leave_alone=True), Rule("Conv", weights=4, activations=4, signed=False)]
    >>> first_match(rules, "encoder/Conv_0").weights
    4
    """

    pattern: str
    leave_alone: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error


def first_match(rules: Iterable[Rule], path: str) -> Rule | None:
    """The first rule whose pattern is found in the path, or None."""
    return next((rule for rule in rules if re.search(rule.pattern, path)), None)


def check_rules(rules: Sequence[Rule], paths: Sequence[str]) -> None:
    """ValueError for a rule that decides nothing, with the paths that there are."""
    deciding = [first_match(rules, path) for path in paths]
    for rule in rules:
        if any(rule is one for one in deciding):
            continue
        matched = [path for path in paths if re.search(rule.pattern, path)]
        if matched:
            raise ValueError(
                f"rule {rule.pattern!r} decides nothing, since rules before it match its layers ({', '.join(matched)}) "
                "too: put it first"
            )
        known = ", ".join(paths) or "none that can be rounded"
        raise ValueError(f"rule {rule.pattern!r} matches no layer; this network has: {known}")
