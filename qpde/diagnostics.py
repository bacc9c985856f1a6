"""Faithfulness: how closely a quantized network follows its own high-precision twin.

The twin is the same network with the same quantized weights and clipped, but not rounded, activations. What
differs between the two is the rounding of activations alone, carried through depth. `compare` measures it
over a data set, block by block and at the logits; the difference is the paper's layer-wise error.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Float

# Images or a graph, alone or with labels.
Batch = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Faithfulness:
    """What `compare` measured: plain floats and NumPy arrays, sums over the whole set.

    Below a and z are the twin's block outputs and logits, a_q and z_q those of the quantized network.

    Attributes:
      samples: number of inputs: images, or nodes.
      accuracy, accuracy_twin: of the quantized network and of the twin; None without labels.
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

    def as_dict(self) -> dict[str, Any]:
        """Fields and means, for JSON: arrays as lists."""
        fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return fields | {
            "mean_layer_error": self.mean_layer_error,
            "mean_relative_layer_error": self.mean_relative_layer_error,
        }


def compare(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Batch],
    bits: Any,
    *,
    twin: Any = None,
    statistics_batches: Iterable[Batch] | None = None,
) -> Faithfulness:
    """A quantized network beside its high-precision twin, over a data set.

    Both run on the same batches, one batch at a time; nothing but a few numbers an input is kept, and these
    are summed in float64. The network is compiled once for both and for all widths: a shorter batch is padded
    to the longest so far, and what was padded is not counted.

    Args:
      model: `apply(variables, x, train=False, return_states=True, bits=...) -> (logits, states)` with logits
        (N, classes) and a tuple of block outputs (N, ...), as every model of `qpde.models`; N counts images or nodes.
      variables: of the quantized network.
      batches: images (N, H, W, C) float32, or pairs of these and integer labels (N,) in 0 .. classes - 1; read
        once. Or a `jraph.GraphsTuple`, or pairs of one and labels of its nodes, -1 where a node does not count: the
        labels of one split make it the set that is measured.
      bits: `qpde.Bits` of the quantized network, its activations not None. The twin's weights have the same.
      twin: variables of the twin if they differ, for instance from an earlier `reestimate_statistics`.
      statistics_batches: batches, best of the training set, from which the twin's batch statistics are
        estimated again. The stored ones belong to the rounded activations they were collected from; with these
        a twin can lose ten points of accuracy.
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
        twin = reestimate_statistics(model, twin, statistics_batches, twin_bits)

    samples, longest, labelled, sums = 0, 0, None, {}
    for index, batch in enumerate(batches):
        x, labels = _split(batch, index)
        if labelled is None:
            labelled = labels is not None
        if labelled != (labels is not None):
            raise ValueError(f"batch {index} has {'no ' if labelled else ''}labels, unlike those before it")
        is_graph = isinstance(x, jraph.GraphsTuple)
        count = _size(x)
        longest = max(longest, count)
        padded = x if is_graph else _pad(x, longest)
        exact = _evaluate(model, twin, padded, twin_bits)
        quantized = _evaluate(model, variables, padded, bits)
        measured = {k: v[:count] for k, v in jax.device_get(_difference(exact, quantized)).items()}
        _check_finite(measured, index)
        if labelled:
            classes = exact[0].shape[-1]
            _check_labels(labels, measured["prediction"], smallest=-1 if is_graph else 0, classes=classes, index=index)
            if is_graph:
                measured, labels = {k: v[labels >= 0] for k, v in measured.items()}, labels[labels >= 0]
                count = len(labels)
            measured["accuracy"] = measured["prediction_q"] == labels
            measured["accuracy_twin"] = measured["prediction"] == labels
        measured["agreement"] = measured.pop("prediction") == measured.pop("prediction_q")
        samples += count
        for name, values in measured.items():
            sums[name] = sums.get(name, 0.0) + values.sum(axis=0, dtype=np.float64)
    if samples == 0:
        raise ValueError("`batches` is empty, or no label counts: there is nothing to compare")

    mean = {name: total / samples for name, total in sums.items()}
    sizes = np.array([a[0].size for a in exact[1]])
    layer_error, layer_rms = np.sqrt(mean["block_error"] / sizes), np.sqrt(mean["block_square"] / sizes)
    return Faithfulness(
        samples=samples,
        accuracy=float(mean["accuracy"]) if labelled else None,
        accuracy_twin=float(mean["accuracy_twin"]) if labelled else None,
        agreement=float(mean["agreement"]),
        margin=float(mean["margin"]),
        kl=max(float(mean["kl"]), 0.0),  # equal distributions may give -1e-9
        logit_error=float(np.sqrt(mean["logit_error"] / exact[0].shape[-1])),
        layer_error=layer_error,
        layer_rms=layer_rms,
        relative_layer_error=layer_error / np.maximum(layer_rms, np.finfo(np.float32).tiny),
    )


def reestimate_statistics(model: nn.Module, variables: Any, batches: Iterable[Batch], bits: Any) -> Any:
    """Batch statistics of a network at given widths, estimated again from data.

    Each statistic becomes the mean of the batches' own, weighted by their number of inputs: what a running
    average with infinite memory would hold. Weights stay as they are; every other collection too.

    Args:
      model: the updates of `apply(variables, x, train=True, momentum=0.0, bits=..., mutable=["batch_stats"])`
        hold the statistics of x alone.
      variables: a network's collections.
      batches: as for `compare`, labels unused. Equally long ones compile once.
      bits: `qpde.Bits` that the network will run at.
    Returns:
      Variables with new "batch_stats"; the same ones if the network has none.
    Raises:
      ValueError: an empty set.
    """
    if "batch_stats" not in variables:
        return variables
    seen, mean = 0, None
    for index, batch in enumerate(batches):
        images, _ = _split(batch, index)
        seen += len(images)
        new = _batch_statistics(model, variables, jnp.asarray(images), bits)
        share = len(images) / seen
        mean = new if mean is None else jax.tree.map(lambda m, s, share=share: m + share * (s - m), mean, new)
    if mean is None:
        raise ValueError("`batches` is empty: batch statistics need at least one batch of images")
    return {**variables, "batch_stats": mean}


@partial(jax.jit, static_argnames="model")
def _evaluate(model, variables, images, bits):
    return model.apply(variables, images, train=False, return_states=True, bits=bits)


@partial(jax.jit, static_argnames="model")
def _batch_statistics(model, variables, images, bits):
    _, updates = model.apply(variables, images, train=True, momentum=0.0, bits=bits, mutable=["batch_stats"])
    return updates["batch_stats"]


@jax.jit
def _difference(exact, quantized):
    """What differs between two outputs, per input: float32 sums stay short, padding is cut off later."""
    (logits, states), (logits_q, states_q) = exact, quantized
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits_q)
    largest, _ = jax.lax.top_k(logits, min(2, logits.shape[-1]))
    return {
        "block_error": jnp.stack([_sum_of_squares(a - a_q) for a, a_q in zip(states, states_q, strict=True)], axis=1),
        "block_square": jnp.stack([_sum_of_squares(a) for a in states], axis=1),
        "logit_error": _sum_of_squares(logits - logits_q),
        "kl": jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1),
        "margin": largest[:, 0] - largest[:, -1],
        "prediction": jnp.argmax(logits, axis=1),
        "prediction_q": jnp.argmax(logits_q, axis=1),
    }


def _sum_of_squares(x):
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def _split(batch, index):
    """Images or graph, and labels (or None), of a batch."""
    is_pair = isinstance(batch, tuple | list) and not isinstance(batch, jraph.GraphsTuple)
    x, labels = batch if is_pair else (batch, None)
    if _size(x) == 0:
        raise ValueError(f"batch {index} holds no images")
    return x, None if labels is None else np.asarray(labels)


def _size(x):
    """The number of images, or of nodes."""
    return x.nodes.shape[0] if isinstance(x, jraph.GraphsTuple) else len(x)


def _pad(images, length):
    """The last image repeated up to the length: finite wherever the images are."""
    missing = length - len(images)
    if missing == 0:
        return jnp.asarray(images)
    return jnp.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1), mode="edge")


def _check_finite(measured, index):
    finite = np.isfinite(measured["block_error"]).all(axis=0)
    if not finite.all():
        raise ValueError(
            f"activations of block {np.argmin(finite)} (of 0 to {len(finite) - 1}) are NaN or infinite "
            f"in batch {index}; look for NaN in the input, then in the weights and batch statistics"
        )
    if not np.isfinite(measured["logit_error"]).all():
        raise ValueError(f"logits are NaN or infinite in batch {index}, the blocks are not; look for NaN in the head")


def _check_labels(labels, predictions, *, smallest, classes, index):
    if labels.shape != predictions.shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels of batch {index} are {labels.dtype} of shape {labels.shape}; they must be integers, "
            f"one for each of its {len(predictions)} images or nodes"
        )
    if labels.min() < smallest or labels.max() >= classes:
        raise ValueError(
            f"labels of batch {index} run from {labels.min()} to {labels.max()}; "
            f"they must lie in {smallest} to {classes - 1}, the network's classes"
        )
