"""Widths for each block under a bit budget: how much each block's rounding changes the outputs, where bits pay most.

With D[c, j] the divergence of the network's softmax from full precision's when block j alone has the widths c, and
C[c, j] the bit-operations of the block at them, an allocation c(j) minimises

    sum_j D[c(j), j]        subject to        sum_j C[c(j), j] <= budget

(Cai et al., 2020, section 3.3). The divergence is quadratic in small errors of the logits, and errors that are
independent add in squares: so the sum stands for the divergence with all blocks rounded.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qpde.batches import Batch, read_batches
from qpde.bits import Bits
from qpde.measure.bit_widths import BitsComparison, compare_bits
from qpde.models.images.cost import summary
from qpde.models.protocol import QuantizedNetwork

__all__ = ["FULL", "allocate", "block_bits", "block_costs", "sensitivity"]

FULL = Bits(32, 32)
"""Widths that round nothing."""


def sensitivity(
    model: QuantizedNetwork,
    variables: Any,
    batches: Iterable[Batch],
    choices: Sequence[Bits],
    *,
    statistics_batches: Iterable[Batch] | None = None,
) -> BitsComparison:
    """Measure what rounding one block alone does to the outputs, for each block and each choice of bits.

    Args:
      model: Network.
      variables: Its collections.
      batches: Inputs, as for `qpde.measure.compare_bits`. Labels are not needed.
      choices: Bits, two scalars each.
      statistics_batches: Inputs on which batch statistics are estimated again, as for `qpde.measure.compare_bits`.
    Returns:
      `BitsComparison` with full precision, whose arrays are (choices, blocks).
    Raises:
      ValueError: As `compare_bits`; choices that are no scalars, or None.
    """
    if any(np.ndim(width) for choice in choices for width in choice):
        raise ValueError("choices are bits of one block, two numbers each")
    batches = read_batches(batches, variables)
    if (first := next(batches, None)) is None:
        raise ValueError("`batches` is empty: there is nothing to measure")
    count = len(model.block_names(variables, first[0]))
    batches = itertools.chain([first], batches)
    rows = [block_bits([choice if i == j else FULL for i in range(count)]) for choice in choices for j in range(count)]
    references = [block_bits([FULL] * count)] * len(rows)
    found = compare_bits(model, variables, batches, rows, references=references, statistics_batches=statistics_batches)
    shape = (len(choices), count)
    arrays: dict[str, Any] = {
        name: value.reshape(shape) for name, value in vars(found).items() if isinstance(value, np.ndarray)
    }
    return dataclasses.replace(found, **arrays)


def block_bits(widths: Sequence[Bits]) -> Bits:
    """Collect the bits of a network's blocks into one `Bits` of int32 arrays (blocks,).

    Args:
      widths: Bits of each block, in the order of the blocks.
    Raises:
      ValueError: Bits that are None.
    """
    if any(part is None for both in widths for part in both):
        raise ValueError("a block's bits are None: give 32, which rounds nothing, in place of None")
    weights, activations = zip(*widths, strict=True)
    return Bits(jnp.asarray(weights, jnp.int32), jnp.asarray(activations, jnp.int32))


def block_costs(
    model: QuantizedNetwork, image_shape: tuple[int, ...], choices: Sequence[Bits]
) -> Int[np.ndarray, "choices blocks"]:
    """Count the bit-operations of each block for one input, at each of the choices of bits.

    Args:
      model: Network.
      image_shape: (H, W, C) of one input.
      choices: Bits, two scalars each.
    Returns:
      Whole numbers (choices, blocks), see `qpde.models.summary`.
    """
    blocks = set(model.block_names(None, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)))
    tables = [summary(model, image_shape, bits=choice).rows for choice in choices]
    return np.array([[row.bit_operations for row in rows if row.name in blocks] for rows in tables], np.int64)


def allocate(
    errors: Float[np.ndarray, "choices blocks"] | list, costs: Int[np.ndarray, "_ _"] | list, budget: int | float
) -> tuple[int, ...]:
    """Choose bits for each block: the least sum of errors among all choices whose costs keep to the budget.

    Exact: block after block it keeps every partial allocation that is not both costlier and worse than another one
    (Nemhauser and Ullmann, 1969). There are as many as different sums of costs at most, which are few where blocks are
    alike.

    Args:
      errors: Errors of each choice for each block, an array or nested lists.
      costs: Costs of each choice for each block, whole numbers.
      budget: In the unit of the costs.
    Returns:
      The index of the choice, for each block; of equally good allocations the cheapest.
    Raises:
      ValueError: Arrays of different shapes, errors that are not finite, costs that are not whole numbers, or a
        budget that is NaN or that no allocation keeps.
    """
    errors, costs = np.asarray(errors, np.float64), np.asarray(costs)
    if errors.ndim != 2 or errors.shape != costs.shape or not errors.size:
        raise ValueError(f"errors {errors.shape} and costs {costs.shape} must have the same shape, (choices, blocks)")
    if not np.isfinite(errors).all():
        raise ValueError("errors must be finite")
    if not np.issubdtype(costs.dtype, np.integer):
        raise ValueError(f"costs are {costs.dtype}: they must be whole numbers, such as those of `block_costs`")
    if np.isnan(budget):
        raise ValueError(f"budget (={budget}) must be a number, in the unit of the costs")
    costs = costs.astype(np.int64)
    # What the blocks from each on cost at least: a partial allocation that leaves less is of no use.
    least = np.append(np.cumsum(costs.min(axis=0)[::-1])[::-1], 0)
    if least[0] > budget:
        raise ValueError(f"budget (={budget:,}) is below what the cheapest bits cost, {least[0]:,}")
    error, cost, steps = np.zeros(1), np.zeros(1, np.int64), []
    for j in range(errors.shape[1]):
        new_error = (error[:, None] + errors[:, j]).ravel()
        new_cost = (cost[:, None] + costs[:, j]).ravel()
        order = np.lexsort((new_error, new_cost))
        order = order[new_cost[order] + least[j + 1] <= budget]
        best_before = np.minimum.accumulate(np.append(np.inf, new_error[order]))[:-1]
        kept = order[new_error[order] < best_before]
        error, cost = new_error[kept], new_cost[kept]
        steps.append(divmod(kept, len(errors)))
    place, chosen = int(np.argmin(error)), []
    for previous, choice in reversed(steps):
        chosen.append(int(choice[place]))
        place = previous[place]
    return tuple(reversed(chosen))
