"""A network as integer kernels, affines and clips: what `qpde.deploy.fold` makes, and every writer of files reads."""

from __future__ import annotations

import dataclasses

from qpde.deploy.program import EXACT_LIMIT, Conv, Program, accumulator_bound

__all__ = ["Folded", "Note", "State"]


@dataclasses.dataclass(frozen=True)
class Note:
    """What a part of the network became.

    Attributes:
      part: "stem", "block0", ..., "neck" or "head".
      weight_bits, act_bits: Bit-widths; None is float32.
      in_float: Reasons why something in it is computed in float32, one each.
    """

    part: str
    weight_bits: int | None
    act_bits: int | None
    in_float: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class State:
    """A state of the network among the values of its program: the output of the stem or of a block.

    Attributes:
      value: Name of the value.
      unit: The real number that 1 stands for.
      relu: Whether the state is max(value, 0), as a quantizer behind it takes it.
    """

    value: str
    unit: float
    relu: bool


@dataclasses.dataclass(frozen=True)
class Folded(Program):
    """A network as integer kernels, affines and clips: what every writer of `qpde.deploy` reads.

    Attributes:
      ops, kernels: See `qpde.deploy.program`.
      name: Name of the architecture.
      channels, num_classes: Of the images and of the logits.
      smallest_image: Smallest side of an image that the network takes.
      notes: What each part became, in order.
      settled: Whether `settle` moved the rounding thresholds away from every reachable sum.
      states: Outputs of the stems and of every block, in order.
      of_pixels: Whether there are logits for every pixel.
    """

    name: str
    channels: int
    num_classes: int
    smallest_image: int
    notes: tuple[Note, ...]
    settled: bool = False
    states: tuple[State, ...] = ()
    of_pixels: bool = False

    def __str__(self) -> str:
        return self.summary()

    def check(self) -> None:
        """Raise a ValueError where an operation reads what there is not yet."""
        known = {"images"}
        for op in self.ops:
            if missing := [x for x in op.inputs if x not in known]:
                raise ValueError(f"{op.out} reads {missing[0]!r}, which no operation before it writes")
            if op.out in known:
                raise ValueError(f"{op.out!r} is written twice")
            if isinstance(op, Conv) and op.kernel not in self.kernels:
                raise ValueError(f"{op.out} needs kernel {op.kernel!r}, which is missing")
            known.add(op.out)
        if "logits" not in known:
            raise ValueError("no operation writes the logits")
        if missing := [state.value for state in self.states if state.value not in known]:
            raise ValueError(f"no operation writes the state {missing[0]!r}")

    def summary(self) -> str:
        """Each part's bit-widths, and what in it is computed in float32 and why, as text."""
        lines = [f"{self.name}{', settled' if self.settled else ''}: {len(self.kernels)} kernels"]
        for note in self.notes:
            widths = "/".join("float" if bits is None else str(bits) for bits in (note.weight_bits, note.act_bits))
            lines.append(f"  {note.part:<8} {widths:<12} {'; '.join(note.in_float) or 'integers'}")
        for name, bound in accumulator_bound(self).items():
            if bound >= EXACT_LIMIT:
                lines.append(f"  {name}: sums up to {bound:,} pass 2^24, where float32 rounds them")
        return "\n".join(lines)
