"""What a network costs, block by block."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qpde.bits import Bits
from qpde.models.images.blocks import Block, depthwise_bits, is_depthwise
from qpde.models.images.network import Network, groups

__all__ = ["Summary", "summary"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: its name, output (H, W, C), parameters without clips, widths, multiply-accumulates, bit-operations,
    and the bytes of its parameters, kernels packed at their width and all else in float32.
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
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )


def summary(model: Network, image_shape: tuple[int, int, int], *, bits: Bits | None = None) -> Summary:
    """Parameters, widths, multiply-accumulates and bit-operations of every block.

    A bit-operation count is MACs * weight bits * activation bits, full precision counted as 32 (Wang et al., 2019).

    Args:
      model: of `create`.   image_shape: (H, W, C) of one input.
      bits: widths, scalars or one per block; None takes the model's own.
    Returns:
      Summary with a row for the stem, each block, a neck if there is one, and the head.
    Raises:
      ValueError: an image smaller than the network's strides.
    """
    bits = model.bits if bits is None else bits
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
    height, width, channels = image_shape
    first = model.stages[0][0].width_in
    rows = [_full_precision("stem", params, (height, width, first), height * width * 9 * channels * first)]
    for s, blocks in enumerate(model.stages):
        for group, block, start, count in groups(blocks):
            parameters = _size({k: v for k, v in params[f"stage{s}"][group].items() if "clips" not in k}) // count
            for b in range(start, start + count):
                rows.append(_block(f"stage{s}.block{b}", block, parameters, (height, width), bits, index=len(rows) - 1))
                height, width = block.output_size(height, width)
    features = model.stages[-1][-1].width_out
    if model.neck_width is not None:
        macs = height * width * features * model.neck_width
        features = model.neck_width
        rows.append(_full_precision("neck", params, (height, width, features), macs))
    rows.append(_full_precision("head", params, (model.num_classes,), features * model.num_classes))
    return Summary(tuple(rows))


def _block(name: str, block: Block, parameters: int, size: tuple[int, int], bits: Bits, index: int) -> Row:
    weights, activations = (
        32 if v is None else int(v if np.ndim(v) == 0 else v[index]) for v in (bits.weights, bits.activations)
    )
    macs = block.macs(*size)
    shapes = block.kernel_shapes()
    kernel_bits = {k: depthwise_bits(weights) if is_depthwise(shapes[k]) else weights for k in macs}
    sizes = {k: math.prod(shapes[k]) for k in macs}
    packed = sum(-(-sizes[k] * kernel_bits[k] // 8) for k in macs)
    return Row(
        name,
        (*block.output_size(*size), block.width_out),
        parameters,
        weights,
        activations,
        sum(macs.values()),
        sum(macs[k] * kernel_bits[k] * activations for k in macs),
        packed + 4 * (parameters - sum(sizes.values())),
    )


def _full_precision(name: str, params: dict, output: tuple[int, ...], macs: int) -> Row:
    own = {k: v for k, v in params.items() if k.startswith(name)}
    return Row(name, output, _size(own), 32, 32, macs, macs * 32 * 32, 4 * _size(own))


def _size(tree: dict) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
