"""What a network is to the functions of qpde that calibrate, quantize and measure: the registered networks follow it,
those of `qpde.quantized`, and any module of a user's that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from qpde.bits import Bits
from qpde.models.layers import Observe

__all__ = ["QuantizedNetwork"]


@runtime_checkable
class QuantizedNetwork(Protocol):
    """A network with quantizers, as a hashable description that is called with its variables.

    A Linen module whose fields are hashable is one. What the functions of qpde use:

        calibrate_clips, converge_norms     bits, apply(observe=, power_iterations=)
        ptq.quantize, ptq.correct_bias      the same, init, with_quantizers, with_bits, output_bias, apply(momentum=)
        compare, compare_bits, sensitivity  apply(return_states=), apply(momentum=) for fresh statistics, block_names
        distributions                       apply(observe=), block_names
        project                             ranges

    Variables are a dict of collections. In "params" the names of clips end in "clips"; "batch_stats" holds statistics,
    whose leaves are named "mean" and "var"; "spectral" the vectors of power iterations. `certify` and
    `ptq.equalize` need more, the structure of `qpde.models.Network`, and refuse others.
    """

    @property
    def bits(self) -> Bits | None:
        """Bits where a call gives none: whole numbers or None for exact. None: they differ from block to block."""

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """(lowest, largest) of parameters that must stay in between, by path. Clips, which are positive, and shares
        ("gamma2_share"), from 0 to 1, are not listed.
        """

    def init(self, rngs: Any, x: Any, *, train: bool = False) -> Any:
        """Variables with random parameters, for inputs of the shape of x: images (N, ...) or a graph."""

    def apply(
        self,
        variables: Any,
        x: Any,
        *,
        train: bool = False,
        bits: Bits | None = None,
        return_states: bool = False,
        observe: Observe | None = None,
        mutable: Any = False,
    ) -> Any:
        """Outputs of the network.

        Args:
          variables: Collections of the network.
          x: Inputs, N along the first axis, or a graph.
          train: Normalise by the batch and drop out. A network with "batch_stats" also takes `momentum`, the share of
            the running statistics that is kept: at 0 they become the batch's own. It then needs no random numbers. One
            with "spectral" takes `power_iterations`, of every norm from the carried vector on.
          bits: `qpde.Bits`, scalars or one value for each block, static or traced. A None rounds nothing.
          return_states: Also return the outputs of the blocks, (N, ...) each, a tuple.
          observe: See `qpde.models.layers.Observe`. Its records go to the collection "observed", at the places of the
            clips in "params": a single one, or a list of those whose clips are one array.
          mutable: As in Linen: True, or names of collections that may change.
        Returns:
          Logits (N, ..., classes), or (logits, states); with `mutable` a pair of this and the changed collections.
        """

    def with_bits(self, bits: Bits) -> QuantizedNetwork:
        """The same network with other bits of its own, whole numbers or None."""

    def with_quantizers(self, bits: Bits, *, per_channel: bool = False) -> QuantizedNetwork:
        """This network with these bits, whose kernels are rounded as they are, so that its parameters keep their
        meaning; `per_channel` gives each output channel of a kernel its own clip.
        """

    def block_names(self, variables: Any, x: Any) -> list[str]:
        """Names of the blocks in the order of their states and of bits that are given one by one."""

    def output_bias(self, variables: Any, x: Any) -> tuple[str, ...] | None:
        """Place in "params" of the bias that is added to the logits last, or None where there is none."""
