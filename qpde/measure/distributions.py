"""What activations look like where they are rounded: how they are spread, and how the levels are used.

Outliers cost levels: a few large values stretch the range and leave the many small ones to few levels. `distributions`
shows this quantizer by quantizer over a data set, for every network that follows `qpde.models.QuantizedNetwork`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from qpde import quantizers
from qpde.batches import Batch, read_batches
from qpde.bits import Bits
from qpde.measure.histograms import edges, histogram, merge
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.layers import Quantizer

__all__ = ["Distribution", "distribution", "distributions"]


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """Distribution of the values x that one quantizer of activations is about to round, over a data set.

    Attributes:
      block: Number of the quantizer's block.
      index: Number of the quantizer in its block; 0 rounds the block's input.
      bits: Bits of the quantizer.
      clip: End of its range, which is [0, clip], or [-clip, clip] if signed.
      signed: Whether the quantizer is signed.
      count: Number of values.
      mean: Mean of all values.
      std: Standard deviation of all values, with the divisor N.
      kurtosis: Mean of (x - mean)^4 / std^4: 3 for a normal distribution, more with outliers, 0 where x is constant.
      outliers: Share of the values further from the mean than `deviations` std, up to a bin of the histogram.
      saturated: Share of the values outside the range, which the clip changes.
      level_shares: Share of the values at each level in use, ascending; zero is a level like others.
      edges: Edges of a histogram. Exact zeros are in the bin that ends at 0.
      counts: Values in each bin, from edges[k] to edges[k + 1].
    """

    block: int
    index: int
    bits: int
    clip: float
    signed: bool
    count: int
    mean: float
    std: float
    kurtosis: float
    outliers: float
    saturated: float
    level_shares: Float[np.ndarray, " levels"]
    edges: Float[np.ndarray, " edges"]
    counts: Float[np.ndarray, " bins"]

    @property
    def used_levels(self) -> int:
        """Number of levels that some value is rounded to."""
        return len(self.level_shares)

    @property
    def entropy(self) -> float:
        """- sum p log2 p over the levels, in bits: what an ideal code would need for a value, at most the width."""
        return float(-np.sum(self.level_shares * np.log2(self.level_shares))) + 0.0


def distributions(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    bits: Bits,
    *,
    deviations: float = 4.0,
) -> list[Distribution]:
    """The distribution of the activations before each of a network's quantizers, over a data set.

    Activations are those of the quantized network. The batches are read once; memory does not grow with their number.

    Args:
      model: Network of `qpde.models` or `qpde.quantized`.
      variables: its collections.
      batches: inputs, images (N, H, W, C) or graphs, or pairs of these and labels, which are not used. Equally long
        ones compile once.
      bits: widths of the network, scalars or one for each block; activations 2 to 8.
      deviations: standard deviations beyond which a value is an outlier.
    Returns:
      One `Distribution` a quantizer of activations, block by block. What a graph network rounds on edges is
      seen without its sign, which depends on the edges' orientation.
    Raises:
      ValueError: no width for activations or one above 8, an empty set or batch, `deviations` <= 0, or NaN or infinite
        activations, naming the block.
    """
    _check_widths(bits)
    if not deviations > 0:
        raise ValueError(f"`deviations` (={deviations}) must be positive, such as 4")
    total: dict[tuple[int, int], _Total] = {}
    for i, (x, _) in enumerate(read_batches(batches, variables)):
        observed = jax.device_get(_seen(model, variables, x, bits))
        found = _by_block(model, observed, variables, x)
        for block, quantized in enumerate(found):
            for index, seen in enumerate(quantized):
                if not np.isfinite(seen.moments).all():
                    raise ValueError(
                        f"activations before quantizer {index} of block {block} (of 0 to {len(found) - 1}) are NaN or "
                        f"infinite in batch {i}; look for NaN in the input, then in the weights and batch statistics"
                    )
                total.setdefault((block, index), _Total()).add(seen)
    if not total:
        raise ValueError("`batches` is empty: give some inputs of the kind that the network was trained on")
    widths = np.broadcast_to(np.asarray(bits.activations), len(found))
    return [t.result(*place, bits=int(widths[place[0]]), deviations=deviations) for place, t in total.items()]


def distribution(
    x: Float[Array, "..."],
    clip: Float[ArrayLike, ""],
    *,
    bits: int,
    signed: bool = False,
    levels: str = "uniform",
    block: int = 0,
    deviations: float = 4.0,
) -> Distribution:
    """The distribution of values that one quantizer of activations is about to round.

    One compiled program serves all values of a shape, of whatever network.

    Args:
      x: The values.
      clip: Clip of the quantizer.
      bits: Bits of the quantizer, 2 to 8.
      signed: Whether its range is [-clip, clip].
      levels: Its set of levels, as for `qpde.quantizers.quantize_activation`.
      block: What the result names as its block.
      deviations: Standard deviations beyond which a value is an outlier.
    Raises:
      ValueError: Bits outside 2 to 8, `deviations` <= 0, or values that are NaN or infinite.
    """
    _check_widths(Bits(None, bits))
    if not deviations > 0:
        raise ValueError(f"`deviations` (={deviations}) must be positive, such as 4")
    seen = jax.device_get(_record(x, jnp.asarray(clip, jnp.float32), jnp.int32(bits), signed, levels))
    if not np.isfinite(seen.moments).all():
        raise ValueError("`x` holds NaN or infinite values: look for what made them so")
    total = _Total()
    total.add(seen)
    return total.result(block, 0, bits=int(bits), deviations=deviations)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["above", "below", "moments", "saturated", "levels", "clip"],
    meta_fields=["count", "signed"],
)
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a quantizer saw of one batch; of equal blocks, stacked. Arrays of the device or of the host.

    Attributes:
      above, below: histograms of the positive values and of the negative ones' magnitudes.
      moments: (4,) the mean, and the sums of (x - mean)^k for k = 2, 3, 4.
      saturated: number of values outside the range.
      levels: (2 LARGEST_LEVEL + 1,) how many values went to each.
    """

    above: Any
    below: Any
    moments: Any
    saturated: Any
    levels: Any
    clip: Any
    count: int
    signed: bool


@partial(jax.jit, static_argnames="model")
def _seen(model, variables, x, bits):
    def observe(x, clip, quantizer: Quantizer):
        if quantizer.is_weight:
            return None, clip
        return _record(x, clip, quantizer.bits, quantizer.signed, quantizer.levels), clip

    return model.apply(variables, x, train=False, bits=bits, observe=observe, mutable=["observed"])[1]["observed"]


@partial(jax.jit, static_argnames=("signed", "levels"))
def _record(x, clip, bits, signed, levels) -> _Seen:
    level = quantizers.level_index(x, clip, bits, levels=levels, signed=signed)
    mean = jnp.mean(x)
    powers = [jnp.sum((x - mean) ** k) for k in (2, 3, 4)]
    size = 2 * quantizers.LARGEST_LEVEL + 1
    return _Seen(
        above=histogram(x, signed=False),
        below=histogram(-x, signed=False),
        moments=jnp.stack([mean, *powers]),
        saturated=jnp.sum((x > clip) | (x < (-clip if signed else 0.0))),
        levels=jnp.zeros(size, jnp.int32).at[level.ravel() + quantizers.LARGEST_LEVEL].add(1),
        clip=clip,
        count=x.size,
        signed=signed,
    )


def _by_block(model, observed, variables, x) -> list[list[_Seen]]:
    """The records of every block's activations, in order."""
    if hasattr(model, "activation_records"):
        blocks = model.activation_records(observed, variables, x)
        return [[seen for stack in block for seen in _unstacked(stack)] for block in blocks]
    if isinstance(model, GraphNetwork):
        stacks = [(observed["layers"], model.depth)]
    else:
        stacks = [(observed[stage][name], count) for stage, name, _, count in model.stacks]
    return [
        [jax.tree.map(lambda leaf, i=i: leaf[i], seen) for seen in stack["act_clips"]]
        for stack, count in stacks
        for i in range(count)
    ]


def _unstacked(seen: _Seen) -> list[_Seen]:
    """The records of equal layers that are stacked, one by one."""
    if np.ndim(seen.clip) == 0:
        return [seen]
    singles = [jax.tree.map(lambda leaf, i=i: leaf[i], seen) for i in range(len(seen.clip))]
    return [one for single in singles for one in _unstacked(single)]


class _Total:
    """The sums over batches, on the host: counts in whole numbers, moments in float64."""

    def __init__(self):
        self.above = self.below = None
        self.count, self.moments, self.saturated = 0, np.zeros(4), 0
        self.levels: np.ndarray = np.zeros((), np.int64)

    def add(self, seen: _Seen) -> None:
        self.above = seen.above if self.above is None else _merge(self.above, seen.above)
        self.below = seen.below if self.below is None else _merge(self.below, seen.below)
        self.moments = _merged_moments(self.count, self.moments, seen.count, np.asarray(seen.moments, np.float64))
        self.count += seen.count
        self.saturated += int(seen.saturated)
        self.levels = self.levels + np.asarray(seen.levels, np.int64)
        self.clip, self.signed = float(seen.clip), seen.signed

    def result(self, block: int, index: int, *, bits: int, deviations: float) -> Distribution:
        mean, second, _, fourth = self.moments
        std = float(np.sqrt(second / self.count))
        ends, counts = _whole(self.above, self.below)
        outside = (ends[:-1] >= mean + deviations * std) | (ends[1:] < mean - deviations * std)
        return Distribution(
            block=block,
            index=index,
            bits=bits,
            clip=self.clip,
            signed=self.signed,
            count=self.count,
            mean=float(mean),
            std=std,
            kurtosis=float(fourth * self.count / second**2) if second > 0 else 0.0,
            outliers=float(counts[outside].sum() / self.count),
            saturated=self.saturated / self.count,
            level_shares=self.levels[self.levels > 0] / self.count,
            edges=ends,
            counts=counts,
        )


_merge = jax.jit(merge)


def _merged_moments(n: int, a: np.ndarray, m: int, b: np.ndarray) -> np.ndarray:
    """Mean and central sums of n and m numbers together (Pébay, 2008, equations 2.1 and 3.1)."""
    total, d = n + m, b[0] - a[0]
    second = a[1] + b[1] + d**2 * n * m / total
    third = a[2] + b[2] + d**3 * n * m * (n - m) / total**2 + 3 * d * (n * b[1] - m * a[1]) / total
    fourth = (
        a[3]
        + b[3]
        + d**4 * n * m * (n * n - n * m + m * m) / total**3
        + 6 * d**2 * (n * n * b[1] + m * m * a[1]) / total**2
        + 4 * d * (n * b[2] - m * a[2]) / total
    )
    return np.array([a[0] + d * m / total, second, third, fourth])


def _whole(above, below) -> tuple[np.ndarray, np.ndarray]:
    """One histogram of both signs, from two of magnitudes, each of which takes the other's values for zeros."""
    # An empty side has the other's bins.
    filled = (above if above.largest else below, below if below.largest else above)
    up, down = (np.asarray(edges(side), np.float64) for side in filled)
    more, less = (np.asarray(h.counts, np.float64) for h in (above, below))
    less[1] += max(more[0] - less[1:].sum(), 0)
    return np.concatenate([-down[::-1], up[1:]]), np.concatenate([less[:0:-1], more[1:]])


def _check_widths(bits: Bits) -> None:
    if bits.activations is None:
        raise ValueError(
            "`bits.activations` (=None): there are no quantizers of activations; give their width, for instance "
            "qpde.Bits(weights=4, activations=4)"
        )
    if outside := [w for w in np.ravel(bits.activations).tolist() if not 2 <= w <= 8]:
        raise ValueError(f"`bits.activations` holds {outside[0]}: levels are counted for 2 to 8 bits")
