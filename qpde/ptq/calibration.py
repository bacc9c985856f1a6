"""Post-training quantization: a network trained in full precision, in few bits, from unlabelled data.

`quantize` does all of it: equalization if asked for (`qpde.ptq.equalize`), clips of weights from the weights, clips of
activations from a stream of batches, and a correction of the moments that rounding changes.

The stream is read once for all clips together: every activation of the exact network is sorted into a histogram of
fixed size, the clips are read off these. So memory does not grow with the stream, and a clip fits the exact network's
activations, to which the correction leads the quantized ones back. Block after block, each behind quantized
predecessors, would take one pass a block.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from qpde.batches import Batch, read_batches
from qpde.bits import Bits
from qpde.measure.faithfulness import reestimate_statistics
from qpde.measure.histograms import Histogram, clip_from, histogram, merge
from qpde.models.clips import calibrate_clips, converge_norms, replace_clips
from qpde.models.graphs.networks import GraphNetwork
from qpde.models.images.network import Network
from qpde.models.layers import Quantizer
from qpde.models.protocol import QuantizedNetwork
from qpde.ptq.equalization import equalize as equalized

__all__ = ["calibrate", "correct_bias", "quantize"]
EXACT = Bits()


def calibrate(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    bits: Bits | None = None,
    weights: str = "mse",
    activations: str = "mse",
) -> dict:
    """Read all clips of a network off data: those of kernels off the kernels, those of activations off all batches.

    For a network that is trained further, or measured as it is. `quantize` does more: it also corrects biases, and
    makes the quantized network of an exact one. At the start of training, where batch statistics say nothing yet, take
    `qpde.models.calibrate_clips` with train=True.

    Args:
      model: A network with quantizers, see `qpde.QuantizedNetwork`.
      variables: Its collections; of `qpde.quantized` those of the module itself will do.
      batches: As for `quantize`, a list.
      bits: Bits that the clips are for. None: the network's own. An exact part keeps its clips.
      weights: How clips of kernels are chosen, see `qpde.quantizers.initial_clip`.
      activations: Likewise those of activations.
    Returns:
      `variables` with new clips.
    Raises:
      ValueError: No batches, batches that can be read only once, an unknown method, activations that are not finite,
        a network with clips for each of several bits, or an own layer of which it is open whether its input can be
        negative (`model.with_signs` decides it).
    """
    variables = unfreeze(dict(variables))
    batches = _read(batches, variables)
    if hasattr(model, "adopt"):
        variables = model.adopt(variables, batches[0])
    if getattr(model, "clip_bits", None) is not None:
        raise ValueError(
            f"this network has clips for each of {model.clip_bits} bits, which `qpde.models.calibrate_clips` reads off "
            "one batch; or calibrate `model.at_bits(variables, bits)`"
        )
    bits = model.bits if bits is None else bits
    if bits is None:
        bits = model.layer_bits(variables, batches[0])
    return _calibrated(model, variables, batches, bits, weights, activations)


def _calibrated(model, variables, batches, bits, weights, activations):
    if bits.weights is not None:
        only = bits._replace(activations=None)
        variables = calibrate_clips(model, variables, batches[0], method=weights, bits=only)
    if bits.activations is None:
        return variables
    # Rounded kernels, since a network that standardizes them is no other without; exact activations, in one pass.
    total = _seen(model, variables, batches, bits._replace(activations=None))
    if np.ndim(bits.activations) == 0:
        return replace_clips(variables, _clips(total, bits.activations, activations))
    widths = [int(width) for width in bits.activations]
    by_width = {width: _clips(total, width, activations) for width in set(widths)}
    names = model.block_names(variables, batches[0])
    return replace_clips(variables, _chosen(by_width, dict(zip(names, widths, strict=True))))


def _chosen(by_width, widths):
    """Of the clips at several widths those of each layer's own, by its path."""

    def own(path, *found):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        (layer,) = [name for name in widths if not name or where.startswith(f"{name}/")][-1:]
        return dict(zip(by_width, found, strict=True))[widths[layer]]

    return jax.tree_util.tree_map_with_path(own, *by_width.values())


def quantize(
    model: QuantizedNetwork,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    bits: Bits,
    *,
    weights: str = "mse",
    activations: str = "mse",
    per_channel: bool = False,
    equalize: bool = False,
    bias_correction: bool = True,
) -> tuple[QuantizedNetwork, dict]:
    """Quantize a network that was trained in full precision, without labels and without training.

    Args:
      model: A network of `qpde.models.create` with weight_bits=None and act_bits=None, or one of `qpde.quantized`.
      variables: Its collections; for `qpde.quantized` those of the module itself will do.
      batches: Inputs, (N, ...) such as images, or graphs, or pairs of these and labels, which are not used; a list, as
        it is read several times. A few hundred images are enough; equally long batches compile once.
      bits: Widths of the new network, whole numbers from 2 to 32 or None for exact.
      weights: Method that chooses the clips of weights, of `qpde.quantizers.initial_clip`: "absmax", "percentile",
        "mse" or "entropy".
      activations: Method that chooses the clips of activations.
      per_channel: A clip for each output channel of a kernel.
      equalize: Rescale channels first, see `qpde.ptq.equalize`; image networks only.
      bias_correction: See `correct_bias`.
    Returns:
      The network with these widths, whose weights are rounded as they are (`standardize=False`) and, for MobileNets,
      block inputs with their sign; and its variables.
    Raises:
      ValueError: A network that has quantizers already, no batches or batches that can be read only once, a width out
        of range, an unknown method, or activations that are not finite, naming the block.
    """
    new = unfreeze(dict(variables))
    inputs = _read(batches, new)
    bits = _checked_bits(bits)
    if isinstance(model, Network | GraphNetwork) and model.bits != EXACT:
        raise ValueError(
            f"this network has quantizers already ({model.bits}): quantize one of weight_bits=None, act_bits=None, or "
            "choose new clips for it by `qpde.models.calibrate_clips`"
        )
    if equalize:
        new = equalized(model, new, inputs)
    if hasattr(model, "adopt"):
        new = model.adopt(new, inputs[0])
    if hasattr(model, "with_signs"):
        model = model.with_signs(new, inputs)
    # One network for all widths: they are traced, so that other widths compile nothing.
    model = model.with_quantizers(EXACT, per_channel=per_channel)
    exact = new = _with_clips_of(model, new, inputs[0])
    if bits.weights is not None:
        only = bits._replace(activations=None)
        new = calibrate_clips(model, new, inputs[0], method=weights, bits=only)
    if bits.activations is not None:
        clips = _activation_clips(model, exact, inputs, bits.activations, method=activations)
        new = replace_clips(new, clips)
    if "spectral" in new:
        new = converge_norms(model, new, inputs[0], bits=bits)
    if bias_correction:
        new = correct_bias(model, new, inputs, bits, exact=exact)
    return model.with_bits(bits), new


def correct_bias(
    model: QuantizedNetwork,
    variables: Mapping[str, Any],
    batches: Iterable[Batch],
    bits: Bits,
    *,
    exact: Mapping[str, Any],
) -> dict:
    """Give a quantized network's channels the exact network's moments again, at every norm and at the logits.

    Rounding, and clipping above all, shifts the mean of a convolution's output and changes its variance. With m_q, v_q
    its moments on the data in the quantized network and m, v in the exact one, the norm behind it subtracts m_q - m
    more (Nagel et al., 2019) and takes its variance times v_q / v. The moments are measured in one pass in which every
    norm uses those of its own batch, as in training, and so each behind corrected predecessors. Then the bias of the
    last layer takes up the mean difference of the logits, if it has one; for networks without norms that is all.

    Args:
      model: Network.
      variables: Its collections.
      batches: Inputs, as for `quantize`.
      bits: Bits of the quantized network.
      exact: Collections of the exact network, which is run without any quantizer.
    Returns:
      `variables` with other batch statistics and another last bias.
    """
    variables, exact = unfreeze(dict(variables)), unfreeze(dict(exact))
    inputs = _read(batches, variables)
    if "batch_stats" in variables:
        before = reestimate_statistics(model, exact, inputs, EXACT)["batch_stats"]
        after = reestimate_statistics(model, variables, inputs, bits)["batch_stats"]
        variables = {**variables, "batch_stats": _shifted(variables["batch_stats"], before, after)}
    bias = model.output_bias(variables, inputs[0])
    if bias is None:
        return variables
    shift = _mean_logits(model, exact, inputs, EXACT) - _mean_logits(model, variables, inputs, bits)
    return {**variables, "params": _added(variables["params"], bias, shift)}


@partial(jax.tree_util.register_dataclass, data_fields=["histogram"], meta_fields=["quantizer"])
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the quantizers of equal blocks have seen: their histograms, stacked."""

    histogram: Histogram
    quantizer: Quantizer


def _activation_clips(model, variables, batches, bits, *, method):
    """Records for `replace_clips` with a clip for every activation, from one pass of the exact network."""
    return _clips(_seen(model, variables, batches, EXACT), bits, method)


def _seen(model, variables, batches, bits):
    """Histograms of all activations of the network at these bits, which leave activations exact."""
    total = None
    for x in batches:
        new = _histograms(model, variables, x, bits)
        total = new if total is None else _merged(total, new)
    for path, seen in jax.tree_util.tree_leaves_with_path(total, is_leaf=_is_seen):
        if not np.isfinite(seen.histogram.largest).all():
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"activations of {where} are NaN or infinite; look for NaN in the batches and the weights")
    return total


@partial(jax.jit, static_argnames="model")
def _histograms(model, variables, x, bits):
    def observe(x, clip, quantizer):
        seen = None if quantizer.is_weight else _Seen(histogram(x, signed=quantizer.signed), quantizer)
        return seen, clip

    return model.apply(variables, x, train=False, bits=bits, observe=observe, mutable=["observed"])[1]["observed"]


@jax.jit
def _merged(a, b):
    def merged(a, b):
        return _Seen(_over_stacks(merge, a.histogram)(a.histogram, b.histogram), a.quantizer)

    return jax.tree.map(merged, a, b, is_leaf=_is_seen)


@partial(jax.jit, static_argnames="method")
def _clips(total, bits, method):
    def clips(seen):
        signed, levels = seen.quantizer.signed, seen.quantizer.levels
        choose = partial(clip_from, bits=bits, signed=signed, method=method, levels=levels)
        return _over_stacks(lambda h: choose(h), seen.histogram)(seen.histogram)

    return jax.tree.map(clips, total, is_leaf=_is_seen)


def _over_stacks(f, histogram):
    """f of histograms that are stacked as this one is: along no axis, or along that of equal blocks."""
    for _ in range(histogram.largest.ndim):
        f = jax.vmap(f)
    return f


def _is_seen(node):
    return isinstance(node, _Seen)


def _with_clips_of(model, variables, x):
    """Variables whose clips have the number that the model's blocks have, their values to be chosen."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)["params"]

    def fitting(path, shape, value=None):
        is_clip = jax.tree_util.keystr(path, simple=True, separator="/").endswith("weight_clips")
        return jnp.ones(shape.shape, shape.dtype) if is_clip else value

    return {**variables, "params": jax.tree_util.tree_map_with_path(fitting, shapes, variables["params"])}


def _shifted(statistics, before, after):
    """Statistics moved by what the data's have moved, means by the difference and variances by the quotient."""

    def moved(path, old, before, after):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("mean"):
            return old + (after - before)
        return old * after / jnp.maximum(before, 1e-12)

    return jax.tree_util.tree_map_with_path(moved, statistics, before, after)


def _mean_logits(model, variables, batches, bits):
    sums = [_sum_of_logits(model, variables, x, bits) for x in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


@partial(jax.jit, static_argnames="model")
def _sum_of_logits(model, variables, x, bits):
    logits = model.apply(variables, x, train=False, bits=bits)
    return logits.sum(tuple(range(logits.ndim - 1))), logits.size // logits.shape[-1]


def _added(params, place, shift):
    """Parameters with a number added at a place."""
    if not place:
        return params + shift
    return {**params, place[0]: _added(params[place[0]], place[1:], shift)}


def _read(batches: Iterable[Batch], variables: Mapping[str, Any]) -> list[Any]:
    """The inputs of all batches, which are read several times."""
    if iter(batches) is batches:
        raise ValueError("`batches` is an iterator, which can be read only once: give a list of batches")
    inputs = [x for x, _ in read_batches(batches, variables)]
    if not inputs:
        raise ValueError("`batches` is empty: give some inputs of the kind that the network was trained on")
    return inputs


def _checked_bits(bits: Bits) -> Bits:
    for field, value in zip(Bits._fields, bits, strict=True):
        if value is not None and not (isinstance(value, int | np.integer) and 2 <= value <= 32):
            raise ValueError(f"bits.{field} (={value}) must be a whole number from 2 to 32, or None for exact")
    return Bits(*(None if value is None else int(value) for value in bits))
