"""Faithfulness: how closely a quantized network follows its own high-precision twin.

The twin is the same network with the same quantized weights and clipped, but not rounded, activations. What
differs between the two is the rounding of activations alone, carried through depth. `compare` measures it
over a data set, block by block and at the logits; the difference is the paper's layer-wise error.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jaxtyping import Array, Float

from qpde.batches import Batch, read_batches
from qpde.measure.batches import mean_over
from qpde.measure.pixels import mean_of_classes


@dataclasses.dataclass(frozen=True, eq=False)
class Faithfulness:
    """What `compare` measured: plain floats and NumPy arrays, sums over the whole set.

    Below a and z are the twin's block outputs and logits, a_q and z_q those of the quantized network.

    Attributes:
      samples: number of inputs: images, or nodes. Shares of a segmentation network's predictions are of pixels.
      accuracy: Accuracy of the quantized network, or None without labels.
      accuracy_twin: Accuracy of the twin, or None without labels.
      iou: Intersection over union of every class of a segmentation network, NaN for one that does not occur; None of
        other networks, and without labels.
      iou_twin: That of the twin.
      agreement: fraction of inputs with the same argmax.
      margin: mean gap between the two largest of z, the yardstick for the logits' error.
      kl: mean Kullback-Leibler divergence of the quantized network's softmax from the twin's, in nats.
      logit_error: root mean square of z - z_q.
      layer_error: per block, sqrt(sum |a - a_q|^2 / numel).
      layer_rms: per block, sqrt(sum |a|^2 / numel).
      relative_layer_error: per block, their ratio, which does not reward a network for small activations. It is
        huge where the twin's block is zero and the other's is not.
    """

    samples: int
    accuracy: float | None
    accuracy_twin: float | None
    iou: Float[np.ndarray, " classes"] | None
    iou_twin: Float[np.ndarray, " classes"] | None
    agreement: float
    margin: float
    kl: float
    logit_error: float
    layer_error: Float[np.ndarray, " blocks"]
    layer_rms: Float[np.ndarray, " blocks"]
    relative_layer_error: Float[np.ndarray, " blocks"]

    @property
    def mean_layer_error(self) -> float:
        """Mean of `layer_error` over blocks, the paper's single number."""
        return float(np.mean(self.layer_error))

    @property
    def mean_relative_layer_error(self) -> float:
        """Mean of `relative_layer_error` over blocks."""
        return float(np.mean(self.relative_layer_error))

    @property
    def mean_iou(self) -> float | None:
        """Mean of `iou` over the classes that occur."""
        return None if self.iou is None else float(mean_of_classes(self.iou))

    @property
    def mean_iou_twin(self) -> float | None:
        """Mean of `iou_twin` over the classes that occur."""
        return None if self.iou_twin is None else float(mean_of_classes(self.iou_twin))

    def as_dict(self) -> dict[str, Any]:
        """Fields and means, for JSON: arrays as lists, None for NaN. Those of pixels where there are any."""
        fields = {k: _without_nan(v) if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        fields["mean_layer_error"] = self.mean_layer_error
        fields["mean_relative_layer_error"] = self.mean_relative_layer_error
        if self.iou is None:
            return {k: v for k, v in fields.items() if k not in ("iou", "iou_twin")}
        return fields | {"mean_iou": self.mean_iou, "mean_iou_twin": self.mean_iou_twin}


def compare(
    model: Any,
    variables: Any,
    batches: Iterable[Batch],
    bits: Any,
    *,
    twin: Any = None,
    statistics_batches: Iterable[Batch] | None = None,
) -> Faithfulness:
    """A quantized network beside its high-precision twin, over a data set.

    Both run on the same batches, one batch at a time; nothing but a few numbers an input is kept, and these
    are summed in float64. The network is compiled once for both and for all bits: a shorter batch is padded
    to the longest so far, and what was padded is not counted.

    Args:
      model: `apply(variables, x, train=False, return_states=True, bits=...) -> (logits, states)` with logits
        (N, classes) and a tuple of block outputs (N, ...), as every model of `qpde.models`; N counts images or nodes.
      variables: Variables of the quantized network.
      batches: images (N, H, W, C) float32, or pairs of these and integer labels (N,) in 0 .. classes - 1; read
        once. Or a `jraph.GraphsTuple`, or pairs of one and labels of its nodes, -1 where a node does not count: the
        labels of one split make it the set that is measured. A segmentation network, whose logits are
        (N, H, W, classes), has labels (N, H, W), -1 where a pixel does not count.
      bits: `qpde.Bits` of the quantized network, its activations not None. The twin's weights have the same.
      twin: Variables of the twin if they differ, for instance from an earlier `reestimate_statistics`.
      statistics_batches: Batches, best of the training set, from which the batch statistics of both networks are
        estimated again, of each at its own bits. The stored ones belong to the activations they were collected from,
        and running averages lag behind the weights: what is compared should be evaluated with statistics of one kind.
    Returns:
      `Faithfulness`.
    Raises:
      ValueError: no width for activations, an empty set, labels on some batches only, of the wrong number or
        out of range, or NaN or infinite activations, naming the block.
    """
    if bits is None or bits.activations is None:
        raise ValueError(
            "`bits.activations` (=None) leaves nothing to compare: give the activations' width, for instance "
            "qpde.Bits(weights=4, activations=4)"
        )
    twin_bits = bits.twin
    twin = variables if twin is None else twin
    if statistics_batches is not None:
        if isinstance(statistics_batches, Iterator):  # it is gone through twice
            statistics_batches = list(statistics_batches)
        variables, twin = (
            reestimate_statistics(model, own, statistics_batches, at)
            for own, at in ((variables, bits), (twin, twin_bits))
        )

    def measure(x, index):
        exact = evaluate(model, twin, x, twin_bits)
        measured = _difference(exact, evaluate(model, variables, x, bits))
        _check_finite(measured, index)
        return measured, exact[0].shape[-1]

    samples, mean = mean_over(batches, variables, measure)
    layer_error, layer_rms = np.sqrt(mean["block_error"]), np.sqrt(mean["block_square"])
    return Faithfulness(
        samples=samples,
        accuracy=None if mean["accuracy"] is None else float(mean["accuracy"]),
        accuracy_twin=None if mean["accuracy_twin"] is None else float(mean["accuracy_twin"]),
        iou=mean["iou"],
        iou_twin=mean["iou_twin"],
        agreement=float(mean["agreement"]),
        margin=float(mean["margin"]),
        kl=max(float(mean["kl"]), 0.0),  # equal distributions may give -1e-9
        logit_error=float(np.sqrt(mean["logit_error"])),
        layer_error=layer_error,
        layer_rms=layer_rms,
        relative_layer_error=layer_error / np.maximum(layer_rms, np.finfo(np.float32).tiny),
    )


def reestimate_statistics(model: Any, variables: Any, batches: Iterable[Batch], bits: Any) -> Any:
    """Batch statistics of a network at given bits, estimated again from data.

    Each statistic becomes the mean of the batches' own, weighted by their number of inputs: what a running
    average with infinite memory would hold. Weights stay as they are; every other collection too.

    Args:
      model: a network, or what is called like one: the updates of `apply(variables, x, train=True, momentum=0.0,
        bits=..., mutable=["batch_stats"])` hold the statistics of x alone.
      variables: a network's collections.
      batches: as for `compare`, labels unused. Equally long ones compile once.
      bits: `qpde.Bits` that the network will run at.
    Returns:
      Variables with new "batch_stats"; the same ones if the network has none.
    Raises:
      ValueError: an empty set, a batch of another form.
    """
    if "batch_stats" not in variables:
        return variables
    variables = unfreeze(variables)
    seen, mean = 0, None
    for images, _ in read_batches(batches, variables):
        seen += len(images)
        new = _batch_statistics(model, variables, jnp.asarray(images), bits)
        mean = new if mean is None else _moved(mean, new, np.float32(len(images) / seen))
    if mean is None:
        raise ValueError("`batches` is empty: batch statistics need at least one batch of images")
    return {**variables, "batch_stats": mean}


def logit_difference(
    logits: Float[Array, "n *pixels classes"], logits_q: Float[Array, "n *pixels classes"]
) -> dict[str, Array]:
    """How logits z_q differ from z, per input: what `qpde.measure.batches.mean_over` takes means of.

    Args:
      logits: z, (N, classes), or (N, H, W, classes) of a segmentation network.
      logits_q: z_q, likewise.
    Returns:
      (N,) each, means over pixels where there are any: "kl", the divergence of softmax(z_q) from softmax(z);
      "logit_error", the mean of |z - z_q|^2 over the classes; "margin" between the two largest of z. And "prediction"
      and "prediction_q", (N,) or (N, H, W).
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits_q)
    largest, _ = jax.lax.top_k(logits, min(2, logits.shape[-1]))
    return {
        "logit_error": _mean_of_squares(logits - logits_q),
        "kl": _mean_of_pixels(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)),
        "margin": _mean_of_pixels(largest[..., 0] - largest[..., -1]),
        "prediction": jnp.argmax(logits, axis=-1),
        "prediction_q": jnp.argmax(logits_q, axis=-1),
    }


def _without_nan(values: np.ndarray) -> list:
    return [None if np.isnan(v) else v for v in values.tolist()]


@partial(jax.jit, static_argnames="model")
def evaluate(model: Any, variables: Any, images: Any, bits: Any) -> tuple[Array, Any]:
    """Logits and block outputs of a network; the one compiled program that `compare` runs.

    Args:
      model: As for `compare`.
      variables: Its collections.
      images: One batch of inputs.
      bits: `qpde.Bits`. Arrays serve all values by one program.
    """
    return model.apply(variables, images, train=False, return_states=True, bits=bits)


@partial(jax.jit, static_argnames="model")
def _batch_statistics(model, variables, images, bits):
    _, updates = model.apply(variables, images, train=True, momentum=0.0, bits=bits, mutable=["batch_stats"])
    return updates["batch_stats"]


@jax.jit
def _moved(mean, new, share):
    """The running mean after one more batch; compiled as a whole, since single operations cost a program each."""
    return jax.tree.map(lambda m, s: m + share * (s - m), mean, new)


@jax.jit
def _difference(exact, quantized):
    """What differs between two outputs, per input: float32 means stay short, padding is cut off later."""
    (logits, states), (logits_q, states_q) = exact, quantized
    if not states:
        raise ValueError("the network has no block that is quantized: there is nothing to compare")
    for i, state in enumerate(states):
        if state.shape[:1] != logits.shape[:1]:
            raise ValueError(
                f"the output of block {i} has shape {state.shape}, not {len(logits)} first, one for each input: leave "
                "that layer alone by a rule of its own"
            )
    return logit_difference(logits, logits_q) | {
        "block_error": jnp.stack([_mean_of_squares(a - a_q) for a, a_q in zip(states, states_q, strict=True)], axis=1),
        "block_square": jnp.stack([_mean_of_squares(a) for a in states], axis=1),
    }


def _mean_of_squares(x):
    return _mean_of_pixels(jnp.square(x))


def _mean_of_pixels(x):
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _check_finite(measured, index):
    finite = np.isfinite(measured["block_error"]).all(axis=0)
    if not finite.all():
        raise ValueError(
            f"activations of block {np.argmin(finite)} (of 0 to {len(finite) - 1}) are NaN or infinite "
            f"in batch {index}; look for NaN in the input, then in the weights and batch statistics"
        )
    if not np.isfinite(measured["logit_error"]).all():
        raise ValueError(f"logits are NaN or infinite in batch {index}, the blocks are not; look for NaN in the head")
