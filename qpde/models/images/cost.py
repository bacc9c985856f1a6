"""What a network costs, block by block."""

from __future__ import annotations

import dataclasses
import math

from qpde.bits import LARGEST_BITS, Bits
from qpde.models.images.block import Block
from qpde.models.images.network import Network, bits_of_block
from qpde.models.images.parts import Part
from qpde.models.layers import depthwise_bits, is_depthwise
from qpde.models.protocol import QuantizedNetwork

__all__ = ["Row", "Summary", "part_row", "summary"]


@dataclasses.dataclass(frozen=True)
class Row:
    """Costs of one layer.

    Its output is (H, W, C). Parameters do not count clips. Bytes are those of its parameters, kernels packed at their
    bits and all else in float32.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    weight_bits: int
    act_bits: int
    macs: int
    bit_operations: int
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows of a network; `str` prints them as a table with a line of totals."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Trainable parameters, the quantizers' clips not counted."""
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(row.macs for row in self.rows)

    @property
    def bit_operations(self) -> int:
        """Sum of multiply-accumulates times weight bits times activation bits."""
        return sum(row.bit_operations for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, kernels packed at their width."""
        return sum(row.weight_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("layer", "output", "parameters", "bits (w/a)", "MACs", "bit-operations")
        lines = [header]
        for r in self.rows:
            shape = "x".join(map(str, r.output))
            widths = f"{r.weight_bits}/{r.act_bits}"
            lines.append((r.name, shape, f"{r.parameters:,}", widths, f"{r.macs:,}", f"{r.bit_operations:,}"))
        lines.append(("total", "", f"{self.parameters:,}", "", f"{self.macs:,}", f"{self.bit_operations:,}"))
        columns = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join([line[0].ljust(columns[0]), *(c.rjust(w) for c, w in zip(line[1:], columns[1:], strict=True))])
            for line in lines
        )


def summary(model: QuantizedNetwork, image_shape: tuple[int, ...], *, bits: Bits | None = None) -> Summary:
    """Parameters, widths, multiply-accumulates and bit-operations of every block.

    A bit-operation count is MACs * weight bits * activation bits, full precision counted as 32 (Wang et al., 2019).

    Args:
      model: Network of `create`.
      image_shape: (H, W, C) of one input.
      bits: Widths, scalars or one per block; None takes the model's own.
    Returns:
      Summary with a row for the stem, each block, a neck if there is one, and the head.
    Raises:
      ValueError: An image smaller than the network's strides.
    """
    if not isinstance(model, Network):
        if not hasattr(model, "summary"):
            raise ValueError(f"the costs of a {type(model).__name__} are not known: it has no method `summary`")
        return model.summary(image_shape, bits=bits)
    bits = model.checked_bits(model.bits if bits is None else bits)
    rows, index = [], 0
    for name, part, size in model.sized_parts(image_shape):
        own = Bits()
        if isinstance(part, Block):
            own, index = bits_of_block(bits, index), index + 1
        rows.append(part_row(name, part, size, own))
    return Summary(tuple(rows))


def part_row(name: str, part: Part, size: tuple[int, int], bits: Bits) -> Row:
    """The row of one part.

    Args:
      name: Name of the row.
      part: A part of an image network.
      size: Height and width of its input.
      bits: Scalars, or None for full precision.
    """
    weights, activations = (LARGEST_BITS if v is None else int(v) for v in bits)
    macs, shapes = part.macs(*size), part.kernel_shapes()
    kernel_bits = {k: depthwise_bits(weights) if is_depthwise(shape) else weights for k, shape in shapes.items()}
    sizes = {k: math.prod(shape) for k, shape in shapes.items()}
    packed = sum(-(-sizes[k] * kernel_bits[k] // 8) for k in shapes)
    return Row(
        name,
        part.output_shape(*size),
        part.parameters,
        weights,
        activations,
        sum(macs.values()),
        sum(macs[k] * kernel_bits[k] * activations for k in macs),
        packed + 4 * (part.parameters - sum(sizes.values())),
    )
