"""The shape of an image network, and the blocks that follow from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qpde.models.images.block import Block
from qpde.models.options import NetworkOptions

__all__ = ["Architecture", "blocks_of_stage"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of an image network.

    Attributes:
      name: Its name, for messages and tables.
      block: Kind of its blocks.
      stages: (width_in, width_out, blocks, stride, expansion) of each stage; see `Block` for the last.
      neck_width: Channels of a 1x1 convolution before the pooling, or None.
    """

    name: str
    block: type[Block]
    stages: tuple[tuple[int, int, int, int, int], ...]
    neck_width: int | None = None

    def with_blocks(self, *counts: int) -> Architecture:
        """Its first stages, with these numbers of blocks."""
        stages = tuple((*row[:2], count, *row[3:]) for row, count in zip(self.stages, counts, strict=False))
        return dataclasses.replace(self, stages=stages)

    def with_width(self, factor: float) -> Architecture:
        """The same shape with that many times the channels, rounded to whole ones.

        The neck grows with a factor above 1 and keeps its width below (MobileNetV2, Sandler et al., 2018).

        Args:
          factor: How many times the channels. 1 changes nothing.
        Raises:
          ValueError: It is not positive and finite, or leaves a stage without channels.
        """
        if factor == 1:
            return self
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"width (={factor}) must be positive and finite: 1 keeps the channels of {self.name}")
        stages = tuple((round(factor * a), round(factor * b), n, stride, e) for a, b, n, stride, e in self.stages)
        fewest = min(row[0] for row in stages)
        if fewest < 1:
            raise ValueError(f"width (={factor}) leaves a stage of {self.name} without channels: choose a larger one")
        neck = self.neck_width and round(max(1.0, factor) * self.neck_width)
        return dataclasses.replace(self, name=f"{self.name} of width {factor:g}", stages=stages, neck_width=neck)


def blocks_of_stage(
    kind: type[Block],
    stage: tuple[int, int, int, int, int],
    options: NetworkOptions,
    *,
    first: dict[str, Any] | None = None,
    **shared: Any,
) -> tuple[Block, ...]:
    """The blocks of one stage.

    Args:
      kind: Kind of the blocks.
      stage: A row of `Architecture.stages`.
      options: Options of the network.
      first: More fields of the first block.
      shared: More fields of all blocks, where `first` does not give them.
    Raises:
      ValueError: The options' expansion leaves K x without channels, or is not finite.
    """
    width_in, width_out, count, stride, expansion = stage
    narrowest = min(width_in, width_out)
    if options.symmetric and not 0.5 < narrowest * expansion * options.expansion < math.inf:
        raise ValueError(
            f"expansion (={options.expansion}) must be finite and leave K x a channel where x has {narrowest}: "
            "1 keeps the architecture's own"
        )

    def block(is_first):
        symmetric = options.symmetric and (not is_first or kind.keeps_width)
        return kind(
            width_in=width_in if is_first else width_out,
            width_out=width_out,
            stride=stride if is_first else 1,
            symmetric=symmetric,
            expansion=expansion * options.expansion if symmetric else expansion,
            **options.of_blocks,
            **(shared | first if is_first and first else shared),
        )

    return tuple(block(i == 0) for i in range(count))
