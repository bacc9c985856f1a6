"""Stages of an image network: the one place where blocks meet Flax, which owns their variables.

Neighbouring blocks of equal description keep every parameter stacked on a leading axis (block, ...), also where there
is only one, and are integrated by `qpde.integrators.integrate`, as a scan or unrolled.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from qpde.bits import Bits
from qpde.integrators import integrate
from qpde.models.images.block import Block
from qpde.models.images.parts import Head
from qpde.models.layers import Mode
from qpde.models.options import Smoothing

__all__ = ["Pooled", "Stage", "gamma2_of", "groups", "store"]


def groups(blocks: tuple[Block, ...], first: int = 0) -> list[tuple[str, Block, int, int]]:
    """Runs of equal blocks in a stage, whose parameters are stacked: (name, block, index of the first, count).

    A run of which no block is chosen for smoothing does not smooth; `first` is how many blocks lie before the stage.
    """
    found, start = [], 0
    for block, equal in itertools.groupby(blocks):
        count = len(list(equal))
        if not any(_smooths(block.smoothing, first + start, count)):
            block = dataclasses.replace(block, smoothing=None)
        name = f"block{start}" if count == 1 else f"blocks{start}to{start + count - 1}"
        found.append((name, block, start, count))
        start += count
    return found


class Pooled(nn.Module):
    """The head of a network, with its variables."""

    part: Head

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        params = {
            "kernel": self.param("kernel", nn.initializers.lecun_normal(), self.part.kernel_shapes()["kernel"]),
            "bias": self.param("bias", nn.initializers.zeros, (self.part.width_out,)),
        }
        held = {
            name: self.variable("batch_stats", name, lambda v=v: v)
            for name, v in self.part.initial_statistics().items()
        }
        variables = {"params": params, "batch_stats": {name: v.value for name, v in held.items()}}
        logits, updates = self.part(variables, x, 1.0, Bits(), mode)
        store(self, held, updates.get("batch_stats", {}))
        return logits


class Stage(nn.Module):
    """Blocks in a row, stacked where they are equal.

    Attributes:
      blocks: their descriptions, in order.
      first_block: index of the first one, counted through the network.
      loop: How blocks are chained, see `qpde.integrators.integrate`.
      remat: Whether the backward pass computes activations again, see `qpde.integrators.integrate`.
    """

    blocks: tuple[Block, ...]
    first_block: int
    loop: str
    remat: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, bits: Bits, mode: Mode, smoothing_scale: jax.Array | None, return_states: bool
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The last block's output, and all of them in order when asked for (else none)."""
        states = []
        for name, block, start, count in groups(self.blocks, self.first_block):
            x, new = self._integrate(
                block, count, name, self.first_block + start, x, bits, mode, smoothing_scale, return_states
            )
            states += new
        return x, states

    def _integrate(self, block, count, name, first, x, bits, mode, smoothing_scale, return_states):
        params = self.param(name, lambda key: jax.vmap(lambda k: block.init(k)[0])(jax.random.split(key, count)))
        params = unfreeze(params)
        held = {"batch_stats": self.variable("batch_stats", name, lambda: _stacked_statistics(block, count))}
        if block.has_spectral_state:
            held["spectral"] = self.variable("spectral", name, self._spectral_start, block, count, params, x.shape)
            expected = (1, *x.shape[1:3], block.width_in)
            found = held["spectral"].value["vector"].shape[1:]
            if found != expected:
                raise ValueError(
                    f"the spectral state of {self.name}/{name} is for maps of {found[1:3]}, "
                    f"this input makes them {x.shape[1:3]}; the norm of a convolution depends on the image size: "
                    "call model.init with images of this size"
                )

        # Widths and smoothing given per block travel with the stacked variables; common ones stay outside the loop.
        own_bits = Bits(*(None if v is None or jnp.ndim(v) == 0 else v[first : first + count] for v in bits))
        gamma2 = gamma2_of(block.smoothing, params, smoothing_scale, first, count)
        own_gamma2 = None if gamma2 is None or jnp.ndim(gamma2) == 0 else gamma2

        def step(x, scanned, step_size):
            variables, widths, own = scanned
            widths = Bits(*(common if own is None else own for own, common in zip(widths, bits, strict=True)))
            x, updates = block(variables, x, step_size, widths, mode, gamma2 if own is None else own)
            return x, (updates, x if return_states else None)

        variables = {"params": params, **{k: unfreeze(v.value) for k, v in held.items()}}
        step_size = block.step_size if isinstance(block.step_size, float) else 1.0
        x, (updates, states) = integrate(
            step,
            (variables, own_bits, own_gamma2),
            x,
            step_size=step_size,
            loop=self.loop if count > 1 else "unroll",  # a lone block may change the shape
            remat=self.remat,
            has_aux=True,
        )
        store(self, held, updates)
        if "observed" in updates:
            self.sow("observed", name, updates["observed"], reduce_fn=lambda _, new: new)
        return x, [states[i] for i in range(count)] if return_states else []

    def _spectral_start(self, block, count, params, shape):
        keys = jax.random.split(self.make_rng("params"), count)
        return jax.vmap(lambda key, p: block.initial_spectral(key, p, shape[1], shape[2]))(keys, params)


def store(module: nn.Module, held: dict[str, nn.Variable], updates: dict[str, Any]) -> None:
    """Keep the changed collections that the caller made mutable; initialisation keeps its starting values."""
    if module.is_initializing():
        return
    for name, variable in held.items():
        if name in updates and module.is_mutable_collection(variable.collection):
            variable.value = updates[name]


def _stacked_statistics(block: Block, count: int) -> Any:
    stats = block.init(jax.random.key(0))[1]
    return jax.tree.map(lambda v: jnp.tile(v[None], (count, *[1] * v.ndim)), stats)


def _smooths(smoothing: Smoothing | None, first: int, count: int) -> list[bool]:
    """Which of `count` blocks from `first` on are chosen for smoothing."""
    return [
        smoothing is not None and (smoothing.blocks is None or i in smoothing.blocks)
        for i in range(first, first + count)
    ]


def gamma2_of(
    smoothing: Smoothing | None, params: dict, smoothing_scale: jax.Array | None, first: int, count: int
) -> jax.Array | float | None:
    """gamma2 for each of these blocks where they may differ, or one for all of them, or None where none smooths."""
    chosen = _smooths(smoothing, first, count)
    if smoothing is None or not any(chosen):
        return None
    gamma2 = params["gamma2"] if smoothing.learned else smoothing.gamma2
    if smoothing_scale is not None:
        gamma2 = smoothing_scale * gamma2
    return gamma2 if all(chosen) else jnp.asarray(chosen, jnp.float32) * gamma2
