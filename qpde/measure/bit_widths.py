"""One set of weights at many widths: how good and how faithful a network is at each, in one compiled program.

Widths are traced, so a network with its quantizers is a family of networks that share everything but their batch
statistics, which belong to the activations of each width. `Elastic` is that family; `compare_bits` measures it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jaxtyping import Float

from qpde.batches import Batch
from qpde.bits import Bits, stack_bits
from qpde.measure.batches import mean_over
from qpde.measure.faithfulness import logit_difference, reestimate_statistics
from qpde.measure.pixels import mean_of_classes

__all__ = ["BitsComparison", "Elastic", "compare_bits"]


@dataclasses.dataclass(frozen=True, eq=False)
class BitsComparison:
    """What `compare_bits` measured, for each of the widths given.

    Attributes:
      samples: number of inputs: images, or nodes.
      accuracy: Accuracy at these bits, or None without labels.
      accuracy_reference: Accuracy at the bits compared with, or None without labels.
      iou: Intersection over union of every class of a segmentation network at these bits, NaN for one that does not
        occur; None of other networks, and without labels.
      iou_reference: That at the bits compared with.
      agreement: fraction of inputs with the same argmax at both.
      kl: mean Kullback-Leibler divergence of the softmax at these widths from that of the reference, in nats.
      logit_error: root mean square of the difference of the logits.
    """

    samples: int
    accuracy: Float[np.ndarray, "*widths"] | None
    accuracy_reference: Float[np.ndarray, "*widths"] | None
    iou: Float[np.ndarray, "*widths classes"] | None
    iou_reference: Float[np.ndarray, "*widths classes"] | None
    agreement: Float[np.ndarray, "*widths"]
    kl: Float[np.ndarray, "*widths"]
    logit_error: Float[np.ndarray, "*widths"]

    @property
    def mean_iou(self) -> Float[np.ndarray, "*widths"] | None:
        """Mean of `iou` over the classes that occur."""
        return None if self.iou is None else mean_of_classes(self.iou)

    @property
    def mean_iou_reference(self) -> Float[np.ndarray, "*widths"] | None:
        """Mean of `iou_reference` over the classes that occur."""
        return None if self.iou_reference is None else mean_of_classes(self.iou_reference)


@dataclasses.dataclass(frozen=True)
class Elastic:
    """A network at several widths at once, called as the network itself is, with a leading axis for the widths.

    Attributes:
      model: a network of `qpde.models`.
    """

    model: Any

    def apply(self, variables: Any, x: Any, *, bits: Bits, **options: Any) -> Any:
        """`model.apply` at each width.

        Args:
          variables: {"params", and other collections with a leading axis for the widths}.
          x: as for the network.
          bits: Bits of `stack_bits`.
          options: Options of the network.
        Returns:
          What the network returns, with a leading axis for the widths.
        """
        collections = dict(variables)
        params = collections.pop("params")

        def at(own: tuple[dict, Bits]) -> Any:
            own_collections, widths = own
            return self.model.apply({"params": params, **own_collections}, x, bits=widths, **options)

        # Not vmapped: a batch fills the device, and convolutions of one input with a kernel for each width are slow, on
        # a CPU 2 to 8 times (resnet20, six widths).
        return jax.lax.map(at, (collections, bits))

    def variables(
        self, variables: Any, bits: Bits, statistics_batches: Iterable[Batch] | None = None
    ) -> dict[str, Any]:
        """The network's variables for `apply`: its collections for each of the widths.

        Args:
          variables: Variables of the network.
          bits: Bits of `stack_bits`.
          statistics_batches: from these, batch statistics are estimated again for each width.
        """
        variables = unfreeze(variables)
        count = len(jax.tree.leaves(bits)[0])

        def copies(leaf):
            return jnp.broadcast_to(leaf, (count, *jnp.shape(leaf)))

        spread = {name: tree if name == "params" else jax.tree.map(copies, tree) for name, tree in variables.items()}
        return spread if statistics_batches is None else reestimate_statistics(self, spread, statistics_batches, bits)


def compare_bits(
    model: Any,
    variables: Any,
    batches: Iterable[Batch],
    bits: Sequence[Bits],
    *,
    references: Sequence[Bits] | None = None,
    statistics_batches: Iterable[Batch] | None = None,
) -> BitsComparison:
    """One set of weights at several widths, each beside a reference: its high-precision twin, or other widths.

    All widths are evaluated by one compiled program, those that occur several times once.

    Args:
      model: A network of `qpde.models` or `qpde.quantized`.
      variables: Its collections.
      batches: Inputs or pairs of inputs and labels, as for `qpde.measure.compare`.
      bits: widths, scalars or one per block; 32 stands for full precision, where a quantizer clips and does not round.
      references: what each of `bits` is compared with; None is the twin of each.
      statistics_batches: batches, best of the training set, from which batch statistics are estimated again for every
        width and reference. The stored ones belong to the widths of training.
    Returns:
      `BitsComparison`.
    Raises:
      ValueError: No bits, bits that are not supported, not as many references, no bits of activations, an
        empty set, bad labels, or NaN or infinite logits.
    """
    if any(row.activations is None for row in bits):
        raise ValueError(
            "`bits.activations` (=None) leaves nothing to compare: give the activations' width, for instance "
            "qpde.Bits(weights=4, activations=4)"
        )
    references = [row.twin for row in bits] if references is None else references
    if len(references) != len(bits):
        raise ValueError(f"{len(references)} references for {len(bits)} widths: give one for each, or none")
    rows, places = _distinct(stack_bits([*bits, *references]))
    low, high = jnp.split(places, 2)
    family = Elastic(model)
    own = family.variables(variables, rows, statistics_batches)

    def measure(x, index):
        logits = _logits(family, own, x, rows)
        if not jnp.isfinite(logits).all():
            raise ValueError(f"logits are NaN or infinite in batch {index}; look for NaN in the input, then in weights")
        return _differences(logits, high, low), logits.shape[-1]

    samples, mean = mean_over(batches, variables, measure)
    return BitsComparison(
        samples=samples,
        accuracy=mean["accuracy"],
        accuracy_reference=mean["accuracy_twin"],
        iou=mean["iou"],
        iou_reference=mean["iou_twin"],
        agreement=mean["agreement"],
        kl=np.maximum(mean["kl"], 0.0),  # equal distributions may give -1e-9
        logit_error=np.sqrt(mean["logit_error"]),
    )


@partial(jax.jit, static_argnames="family")
def _logits(family, variables, x, bits):
    return family.apply(variables, x, train=False, bits=bits)


@jax.jit
def _differences(logits, high, low):
    """`logit_difference` of pairs of rows, (N, pairs) each."""
    return jax.vmap(lambda i, j: logit_difference(logits[i], logits[j]), out_axes=-1)(high, low)


def _distinct(bits: Bits) -> tuple[Bits, jax.Array]:
    """The different rows of stacked widths, and which of them each row is."""
    table = np.concatenate([np.asarray(part).reshape(len(part), -1) for part in bits if part is not None], axis=1)
    _, first, places = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return jax.tree.map(lambda part: part[first], bits), jnp.asarray(places.reshape(-1), jnp.int32)
