"""A network: stem convolution, stages of blocks integrated step by step, pooling, dense head.

`Stage` is the one place where blocks meet Flax: it owns their variables. Neighbouring blocks of equal description
keep every parameter stacked on a leading axis (block, ...), also where there is only one, and are integrated by
`qpde.integrators.integrate`, as a scan or unrolled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qpde import operators, stencils
from qpde.bits import Bits
from qpde.integrators import integrate
from qpde.models.images.blocks import Block, Smoothing
from qpde.models.layers import Mode, Observe, divide_by_rms, he_normal, moments, moved, normalize

__all__ = ["Network", "Stage", "groups"]


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


class Norm(nn.Module):
    """Batch norm over all axes but the last."""

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        width = (x.shape[-1],)
        params = {
            "scale": self.param("scale", nn.initializers.ones, width),
            "bias": self.param("bias", nn.initializers.zeros, width),
        }
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, width),
            "var": self.variable("batch_stats", "var", jnp.ones, width),
        }
        mean, var, updated = moments(x, {k: v.value for k, v in running.items()}, mode)
        _store(self, running, updated)
        return normalize(x, params, mean, var)


class RootMeanSquare(nn.Module):
    """Division of x (N, C) by the root mean square of all its numbers; in evaluation by the running one."""

    @nn.compact
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        running = {"mean_square": self.variable("batch_stats", "mean_square", jnp.ones, ())}
        old = running["mean_square"].value
        if not mode.train:
            return divide_by_rms(x, old)
        own = jnp.mean(x * x)
        kept = moved(old, jax.lax.stop_gradient(own), mode.momentum)
        _store(self, running, {"mean_square": kept})
        return divide_by_rms(x, own)


class Stage(nn.Module):
    """Blocks in a row, stacked where they are equal.

    Attributes:
      blocks: their descriptions, in order.   first_block: index of the first one, counted through the network.
      loop, remat: of `qpde.integrators.integrate`.
    """

    blocks: tuple[Block, ...]
    first_block: int
    loop: str
    remat: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, bits: Bits, mode: Mode, strength: jax.Array | None, return_states: bool
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The last block's output, and all of them in order when asked for (else none)."""
        states = []
        for name, block, start, count in groups(self.blocks, self.first_block):
            x, new = self._integrate(
                block, count, name, self.first_block + start, x, bits, mode, strength, return_states
            )
            states += new
        return x, states

    def _integrate(self, block, count, name, first, x, bits, mode, strength, return_states):
        params = self.param(name, lambda key: jax.vmap(lambda k: block.init(k)[0])(jax.random.split(key, count)))
        held = {"batch_stats": self.variable("batch_stats", name, lambda: _stacked_statistics(block, count))}
        if block.has_spectral_state:
            held["spectral"] = self.variable("spectral", name, self._spectral_start, block, count, params, x.shape)
            expected = (1, *x.shape[1:3], block.width_in)
            if held["spectral"].value.shape[1:] != expected:
                raise ValueError(
                    f"the spectral state of {self.name}/{name} is for maps of {held['spectral'].value.shape[2:4]}, "
                    f"this input makes them {x.shape[1:3]}; the norm of a convolution depends on the image size: "
                    "call model.init with images of this size"
                )

        # Widths and smoothing given per block travel with the stacked variables; common ones stay outside the loop.
        own_bits = Bits(*(None if v is None or jnp.ndim(v) == 0 else v[first : first + count] for v in bits))
        gamma2 = _gamma2(block.smoothing, params, strength, first, count)
        own_gamma2 = None if gamma2 is None or jnp.ndim(gamma2) == 0 else gamma2

        def step(x, scanned, step_size):
            variables, widths, own = scanned
            widths = Bits(*(common if own is None else own for own, common in zip(widths, bits, strict=True)))
            x, updates = block(variables, x, step_size, widths, mode, gamma2 if own is None else own)
            return x, (updates, x if return_states else None)

        variables = {"params": params, **{k: v.value for k, v in held.items()}}
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
        _store(self, held, updates)
        if "observed" in updates:
            self.sow("observed", name, updates["observed"], reduce_fn=lambda _, new: new)
        return x, [states[i] for i in range(count)] if return_states else []

    def _spectral_start(self, block, count, params, shape):
        keys = jax.random.split(self.make_rng("params"), count)
        return jax.vmap(lambda key, p: block.initial_spectral(key, p, shape[1], shape[2]))(keys, params)


class Network(nn.Module):
    """Image classifier of qpde; make one with `qpde.models.create`; `image_network` documents the attributes.

    A collection "smoothing" with a scalar "strength" in [0, 1], added to the variables of a network that smooths,
    multiplies every gamma2: at 0 it is the network without smoothing, at 1 what it is without the collection.
    """

    name_of_architecture: str
    stages: tuple[tuple[Block, ...], ...]
    num_classes: int
    neck_width: int | None
    weight_bits: int | None
    act_bits: int | None
    loop: str
    remat: bool
    compute_dtype: str = "float32"
    head: str = "dense"

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order."""
        return tuple(itertools.chain(*self.stages))

    @property
    def stacks(self) -> list[tuple[str, str, Block, int]]:
        """All blocks in order, as their parameters are stacked: (stage, name, block, count)."""
        firsts = itertools.accumulate(map(len, self.stages), initial=0)
        return [
            (f"stage{s}", name, block, count)
            for s, (first, blocks) in enumerate(zip(firsts, self.stages, strict=False))
            for name, block, _, count in groups(blocks, first)
        ]

    @property
    def clip_bits(self) -> tuple[int, ...] | None:
        """Widths that have clips of their own, or None where one clip serves all."""
        return self.stages[0][0].clip_bits

    @property
    def bits(self) -> Bits:
        """The widths that the network was created with."""
        return Bits(self.weight_bits, self.act_bits)

    def with_quantizers(self, bits: Bits, *, per_channel: bool = False) -> Network:
        """This full-precision network with quantizers, whose parameters keep their meaning.

        Weights are then rounded as they are, since standardizing would change the function, and block inputs that can
        be negative with their sign.

        Args:
          bits: whole numbers or None.   per_channel: one weight clip for each output channel.
        """
        replaced = {"standardize": False, "per_channel": per_channel}
        stages = tuple(
            tuple(dataclasses.replace(b, **replaced, signed_inputs=b.has_signed_inputs) for b in blocks)
            for blocks in self.stages
        )
        return self.clone(stages=stages, weight_bits=bits.weights, act_bits=bits.activations)

    def at_bits(self, variables: dict, bits: Bits) -> tuple[Network, dict]:
        """Of a network with clips for each width, the ordinary one at these widths: the same function, and its twin is
        that function without rounding.

        Args:
          variables: of this network.   bits: whole numbers or None.
        Returns:
          The network, created with these widths and one clip for all, and its variables.
        """
        params = dict(variables["params"])
        for stage, name, block, _ in self.stacks:
            own = params[stage][name]
            params[stage] = params[stage] | {name: own | jax.vmap(partial(block.clips_at, bits=bits))(own)}
        stages = tuple(tuple(dataclasses.replace(b, clip_bits=None) for b in blocks) for blocks in self.stages)
        model = self.clone(stages=stages, weight_bits=bits.weights, act_bits=bits.activations)
        return model, {**variables, "params": params}

    def steps(self, variables: dict) -> list[tuple[Block, dict, float, Any]]:
        """The blocks one by one: (block, its own variables, step size, gamma2), what a block is called with.

        One that is not chosen for smoothing comes without it, and its gamma2 is None.
        """
        found, strength = [], variables.get("smoothing", {}).get("strength")
        for stage, name, block, count in self.stacks:
            step_size = block.step_size if isinstance(block.step_size, float) else 1.0
            stacked = {k: v[stage][name] for k, v in variables.items() if name in v.get(stage, {})}
            for i in range(count):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
                gamma2 = _gamma2(block.smoothing, own["params"], strength, len(found), 1)
                single = block if gamma2 is not None else dataclasses.replace(block, smoothing=None)
                found.append((single, own, step_size, gamma2))
        return found

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """(lowest, largest) of parameters that must stay in between, by path: of a learned gamma2, where it is stable.

        Outside its range a gamma2 acts as the nearer end of it and has no gradient. So project it after each step of
        learning; from the ends themselves the gradient leads back.
        """
        return {
            f"{stage}/{name}/gamma2": (
                0.0,
                stencils.max_stable_step(eps=block.smoothing.eps, kind=block.smoothing.kind),
            )
            for stage, name, block, _ in self.stacks
            if block.learns_gamma2
        }

    @property
    def smallest_image(self) -> int:
        """The smallest side of an image: that of all strides together, or more where a block needs a larger map."""

        def fits(side):
            for block in self.blocks:
                if side < block.smallest_map:
                    return False
                side = block.output_size(side, side)[0]
            return True

        total_stride = math.prod(block.stride for block in self.blocks)
        return next(side for side in itertools.count(total_stride) if fits(side))

    @nn.compact
    def __call__(
        self,
        x: Array | np.ndarray,
        *,
        train: bool = False,
        bits: Bits | None = None,
        return_states: bool = False,
        momentum: float = 0.9,
        observe: Observe | None = None,
        power_iterations: int = 1,
    ):
        """Logits of images.

        Args:
          x: (N, H, W, C) float32, H and W at least `smallest_image`.
          train: normalise by the batch's statistics; the running ones change when "batch_stats" is mutable.
          bits: `qpde.Bits` for this call, values static or traced; None is the widths of `create`.
          return_states: also return the blocks' outputs, in order.
          momentum: share of the running statistics that is kept; 0 stores the batch's own.
          observe: sees what every quantizer rounds, chooses its clip for this call, and records anything, which is
            sown into the collection "observed", each block's like its parameters: lists of records in place of
            `weight_clips` and `act_clips`. See `qpde.models.layers.Observe`.
          power_iterations: of every spectral norm, from the carried vector on, which moves when "spectral" is mutable.
        Returns:
          logits (N, num_classes), or (logits, tuple of states).
        Raises:
          ValueError: wrong rank, images that are not floating or smaller than `smallest_image`, bits per block of
            another number than blocks.
        """
        self._check_input(x)
        bits = self.checked_bits(self.bits if bits is None else bits)
        mode = Mode(train, momentum, observe, power_iterations, self.compute_dtype)

        kernel = self.param("stem_kernel", he_normal, (3, 3, x.shape[-1], self.stages[0][0].width_in))
        x = jax.nn.relu(Norm(name="stem_norm")(self._conv(x, kernel), mode))
        states, first, strength = [], 0, self.get_variable("smoothing", "strength")
        for i, blocks in enumerate(self.stages):
            stage = Stage(blocks, first, self.loop, self.remat, name=f"stage{i}")
            x, new = stage(x, bits, mode, strength, return_states)
            states, first = states + new, first + len(blocks)
        if self.neck_width is not None:
            kernel = self.param("neck_kernel", he_normal, (1, 1, x.shape[-1], self.neck_width))
            x = jax.nn.relu(Norm(name="neck_norm")(self._conv(x, kernel), mode))
        pooled = x.mean((1, 2))
        if self.head == "scaled":
            pooled = RootMeanSquare(name="pooled")(pooled, mode)
        logits = nn.Dense(self.num_classes, name="head")(pooled)
        return (logits, tuple(states)) if return_states else logits

    def _conv(self, x, kernel):
        return operators.conv(x, kernel.astype(self.compute_dtype))

    def _check_input(self, x):
        if x.ndim != 4:
            raise ValueError(f"images must be (N, H, W, C); got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"images of dtype {x.dtype} must be floating: x.astype(jnp.float32), and scale them")
        side = self.smallest_image
        if any(size < side for size in x.shape[1:3]):
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} are too small for {self.name_of_architecture}: "
                f"pad or resize them to at least {side}x{side}"
            )

    def checked_bits(self, bits: Bits) -> Bits:
        """These widths, lists as arrays; ValueError for another number of them than blocks."""
        values = []
        for field, value in zip(Bits._fields, bits, strict=True):
            if isinstance(value, (tuple, list)):
                value = jnp.asarray(value)
            if value is not None and jnp.ndim(value) > 0 and jnp.shape(value) != (len(self.blocks),):
                raise ValueError(
                    f"bits.{field} has shape {jnp.shape(value)}; give one value, or one for each of the "
                    f"{len(self.blocks)} blocks"
                )
            values.append(value)
        return Bits(*values)


def _store(module: nn.Module, held: dict[str, nn.Variable], updates: dict[str, Any]) -> None:
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


def _gamma2(
    smoothing: Smoothing | None, params: dict, strength: jax.Array | None, first: int, count: int
) -> jax.Array | float | None:
    """gamma2 for each of these blocks where they may differ, or one for all of them, or None where none smooths."""
    chosen = _smooths(smoothing, first, count)
    if not any(chosen):
        return None
    gamma2 = params["gamma2"] if smoothing.learned else smoothing.gamma2
    if strength is not None:
        gamma2 = strength * gamma2
    return gamma2 if all(chosen) else jnp.asarray(chosen, jnp.float32) * gamma2
