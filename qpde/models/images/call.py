"""One call of a block: what its formula calls by name, and the record of what that changed.

In evaluation of few bits, products are those of codes, which are whole numbers: see `Call.product`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qpde import norms, operators, quantizers, stencils
from qpde.bits import EXACT_BITS, EXACT_LIMIT, Bits
from qpde.models.layers import Mode, Quantizer, depthwise_bits, is_depthwise, moments, normalize, row
from qpde.models.options import BlockOptions

__all__ = ["Call"]


class Call:
    """What the formula of one step calls by name.

    Args:
      block: Options of the block.
      kernels: Names of its kernels.
      clips: "weight_clips", in the order of `kernels`, and "act_clips", at the bits of the call.
      variables: Variables of the block.
      bits: Bits of the call.
      mode: As `Block.__call__` takes it.
      gamma2: Step of the smoothing, or None.
    """

    def __init__(
        self,
        block: BlockOptions,
        kernels: Iterable[str],
        clips: dict[str, list[jax.Array]],
        variables: dict,
        bits: Bits,
        mode: Mode,
        gamma2: Any,
    ):
        self.block, self.names, self.clips = block, tuple(kernels), clips
        self.bits, self.mode, self.gamma2 = bits, mode, gamma2
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.singular_vector = variables.get("spectral", {}).get("vector")
        self.steps: dict[str | int, _Step] = {}
        self.updates: dict[str, Any] = {"batch_stats": {}}
        if mode.observe is not None:
            self.updates["observed"] = {name: [None] * len(own) for name, own in clips.items()}

    def kernels(self) -> dict[str, jax.Array]:
        """Q_w of every kernel, in the dtype to compute in."""
        quantized = {}
        for i, name in enumerate(self.names):
            kernel, bits = self.params[name], self.bits.weights
            if bits is not None and is_depthwise(kernel.shape):
                bits = depthwise_bits(bits)
            if bits is not None and self.block.standardize:
                kernel = quantizers.standardize_weight(kernel)
            self._observe("weight_clips", i, kernel, bits, signed=True)
            rounded = quantizers.quantize_weight(kernel, self.clips["weight_clips"][i], bits, levels=self.block.levels)
            quantized[name] = rounded.astype(self.mode.compute_dtype)
            self._note_step(name, rounded, self.clips["weight_clips"][i], bits, signed=True)
        return quantized

    def _note_step(self, key: str | int, rounded: jax.Array, clip: jax.Array, bits: Any, *, signed: bool) -> None:
        """Keep what codes are made from, in evaluation and where the levels are whole multiples of a step."""
        is_exact = bits is None or (isinstance(bits, int) and bits >= EXACT_BITS)
        in_float32 = self.mode.compute_dtype == "float32"  # bfloat16 would round the sums
        if not self.mode.train and in_float32 and not is_exact and self.block.levels == "uniform":
            step = quantizers.quantization_step(clip, bits, signed=signed)
            self.steps[key] = _Step(rounded, step, bits, signed)

    def conv(
        self,
        x: jax.Array,
        index: int | None,
        kernels: dict,
        name: str,
        operator: Callable = operators.conv,
        **options: Any,
    ) -> jax.Array:
        """K x with one kernel, see `product`; x is the activation of that index, None for other numbers."""
        return self.product(lambda k, x: operator(x, k[name], **options), {name: kernels[name]}, x, index)

    def product(
        self, linear: Callable, kernels: dict, x: jax.Array, index: int | None, *, is_adjoint: bool = False
    ) -> jax.Array:
        """linear(kernels, x); in evaluation of codes, which are whole numbers, and scaled afterwards.

        Sums of whole numbers below 2^24 are the same in any order: on every device, in every batch, jitted or not.
        Where the codes at hand may pass it, and where there are none, sums are those of real numbers.
        """
        found = [self.steps.get(key) for key in (index, *kernels)]
        known = [step for step in found if step is not None]
        if len(known) < len(found):
            return linear(kernels, x)
        act, *weights = known
        one_step = all(jnp.ndim(w.step) == 0 for w in weights)
        if not one_step and (is_adjoint or len(weights) > 1):
            return linear(kernels, x)
        codes = [_nearest(w.values / _along(w.step, w.values.ndim)) for w in weights]
        bound = act.largest * math.prod(_largest_sum(k, is_adjoint=is_adjoint) for k in codes)
        fits = (bound < EXACT_LIMIT) & act.has_codes
        for weight in weights:
            fits = fits & weight.has_codes
        kernels = {
            name: jnp.where(fits, code, weight.values)
            for name, code, weight in zip(kernels, codes, weights, strict=True)
        }
        sums = linear(kernels, jnp.where(fits, _nearest(x / act.step), x))
        scale = act.step * functools.reduce(jnp.multiply, [w.step for w in weights])
        return sums * jnp.where(fits, _along(scale, sums.ndim), 1.0)

    def _observe(self, name, index, x, bits, *, signed):
        if self.mode.observe is not None:
            quantizer = Quantizer(name == "weight_clips", bits, signed, self.block.levels)
            record, self.clips[name][index] = self.mode.observe(x, self.clips[name][index], quantizer)
            self.updates["observed"][name][index] = record

    def activation(self, x: jax.Array, index: int, *, signed: bool = False) -> jax.Array:
        """Q_a with the clip of that index."""
        bits = self.bits.activations
        self._observe("act_clips", index, x, bits, signed=signed)
        clip = self.clips["act_clips"][index]
        rounded = quantizers.quantize_activation(x, clip, bits, levels=self.block.levels, signed=signed)
        self._note_step(index, rounded, clip, bits, signed=signed)
        return rounded

    def shortcut(self, x: jax.Array, xq: jax.Array, *, signed: bool = False) -> jax.Array:
        """Input of the shortcut: xq (rounded), or x clipped alone (precise), so rounding enters by the branch only."""
        if self.block.residual == "rounded" or self.bits.activations is None:
            return xq
        return quantizers.quantize_activation(x, self.clips["act_clips"][0], 32, signed=signed)

    def smooth(self, x: jax.Array) -> jax.Array:
        """S after a nonlinearity inside the block."""
        s = self.block.smoothing
        if self.gamma2 is None or s is None:
            return x
        return stencils.smooth(x, steps=s.steps, gamma2=self.gamma2, eps=s.eps, kind=s.kind)

    def smooth_output(self, x: jax.Array) -> jax.Array:
        """S of the block's output, where asked for."""
        return self.smooth(x) if self.block.smoothing is not None and self.block.smoothing.output else x

    def statistics(self, name: str, x: jax.Array) -> tuple[jax.Array, Any]:
        """Mean and variance (C,) that normalise x: the batch's in training, else the running ones."""
        mean, var, self.updates["batch_stats"][name] = moments(x, self.stats[name], self.mode)
        return mean, var

    def batch_norm(self, name: str, x: jax.Array) -> jax.Array:
        """(x - mean) / sqrt(var + 1e-5) * scale + bias, per channel."""
        return normalize(x, self.params[name], *self.statistics(name, x))

    def spectral_norm(self, linear: Callable, adjoint: Callable, scale: jax.Array) -> jax.Array:
        """|D K| from the carried singular vector, differentiable in D and K; a floor keeps steps of D K = 0 finite."""
        d = row(scale)
        sigma, vector = norms.power_iterations(
            lambda v: d * linear(v), lambda u: adjoint(d * u), self.singular_vector, self.mode.power_iterations
        )
        self.updates["spectral"] = {"vector": vector}
        return jnp.maximum(sigma, 1e-3)


class _Step(NamedTuple):
    """What codes of rounded values are made from."""

    values: jax.Array
    step: jax.Array
    bits: Any
    signed: bool

    @property
    def largest(self) -> jax.Array:
        return jnp.exp2(jnp.asarray(self.bits, jnp.float32) - float(self.signed)) - 1

    @property
    def has_codes(self) -> jax.Array:
        return jnp.asarray(self.bits) < EXACT_BITS


def _nearest(v: jax.Array) -> jax.Array:
    """Whole numbers of values that are some up to rounding, with the gradient of v."""
    return v + jax.lax.stop_gradient(jnp.round(v) - v)


def _along(scale: jax.Array, ndim: int) -> jax.Array:
    """A scalar as it is, one number a channel along the last axis."""
    return scale.reshape((1,) * (ndim - 1) + (-1,)) if scale.ndim else scale


def _largest_sum(codes: jax.Array, *, is_adjoint: bool) -> jax.Array:
    """The largest sum of magnitudes that one output of a convolution, or of its adjoint, adds up."""
    summed = (0, 1, 3) if is_adjoint and not is_depthwise(codes.shape) else (0, 1, 2)
    return jnp.abs(codes).sum(summed).max()
