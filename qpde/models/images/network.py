"""A network: stem convolution, stages of blocks integrated step by step, pooling, dense head.

Its parts are pure functions; `qpde.models.images.stages` owns the variables of blocks and chains them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jaxtyping import Array

from qpde import stencils
from qpde.bits import Bits
from qpde.models.images.architecture import Architecture, blocks_of_stage
from qpde.models.images.block import Block
from qpde.models.images.parts import ExactConv, Head, Part
from qpde.models.images.stages import Pooled, Stage, gamma2_of, groups, store
from qpde.models.layers import Mode, Observe
from qpde.models.options import NetworkOptions

__all__ = ["BoundPart", "Layer", "Network", "bits_of_block"]


class Layer(NamedTuple):
    """A stage of a network with what it takes.

    Attributes:
      name: Its name.
      sources: Names of the stages, or stems, whose outputs it takes; several are joined as channels.
      blocks: Its blocks.
    """

    name: str
    sources: tuple[str, ...]
    blocks: tuple[Block, ...]


class BoundPart(NamedTuple):
    """A part of a network with what it is called with.

    Attributes:
      part: Its description.
      variables: Its own variables.
      step_size: h, 1 where a block finds its own and for parts that are no steps.
      gamma2: Step of its smoothing, or None.
      bits: Its bits, scalars or None.
    """

    part: Part
    variables: dict
    step_size: Any
    gamma2: Any
    bits: Bits

    def __call__(self, x: Array, mode: Mode) -> Array:
        """Output of the part."""
        return self.part(self.variables, x, self.step_size, self.bits, mode, self.gamma2)[0]


class Network(nn.Module):
    """Image classifier of qpde: a list of parts. Make one with `qpde.models.create` or `image_network`.

    A collection "smoothing" with a scalar "scale" in [0, 1], added to the variables of a network that smooths,
    multiplies every gamma2: at 0 it is the network without smoothing, at 1 what it is without the collection.

    Attributes:
      architecture: Its shape.
      num_classes: Number of classes.
      options: All its options.
    """

    architecture: Architecture
    num_classes: int
    options: NetworkOptions

    @functools.cached_property
    def stages(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks by stage."""
        return tuple(
            blocks_of_stage(self.architecture.block, stage, self.options) for stage in self.architecture.stages
        )

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The stages, each with the stages or stems that it takes."""
        names = [self.stem_parts()[-1][0], *(f"stage{s}" for s in range(len(self.stages)))]
        return tuple(
            Layer(name, (source,), blocks) for source, name, blocks in zip(names, names[1:], self.stages, strict=False)
        )

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages, in order."""
        return [layer.name for layer in self.layers]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order."""
        return tuple(itertools.chain(*self.stages))

    @property
    def stacks(self) -> list[tuple[str, str, Block, int]]:
        """All blocks in order, as their parameters are stacked: (stage, name, block, count)."""
        firsts = itertools.accumulate(map(len, self.stages), initial=0)
        return [
            (stage, name, block, count)
            for stage, first, blocks in zip(self.stage_names, firsts, self.stages, strict=False)
            for name, block, _, count in groups(blocks, first)
        ]

    def stem_part(self, channels: int = 3) -> ExactConv:
        """The first convolution, for images of that many channels."""
        return ExactConv(channels, self.stages[0][0].width_in, 3, "conv1", "bn1")

    def stem_parts(self, channels: int = 3) -> list[tuple[str, ExactConv]]:
        """The convolutions before the blocks by name, for images of that many channels."""
        return [("stem", self.stem_part(channels))]

    @property
    def neck_part(self) -> ExactConv | None:
        """The 1x1 convolution before the pooling, if there is one."""
        width = self.architecture.neck_width
        if width is None:
            return None
        return ExactConv(self.blocks[-1].width_out, width, 1, "layers.7.0.0.weight", "layers.7.0.1")

    @property
    def head_part(self) -> Head:
        """Pooling and dense layer."""
        width = self.architecture.neck_width or self.blocks[-1].width_out
        return Head(width, self.num_classes, self.options.head)

    def parts(self, channels: int = 3) -> list[tuple[str, Part]]:
        """All parts in order, by name: stem, blocks, neck if there is one, head."""
        # As they are stacked: a run of blocks of which none is chosen for smoothing does not smooth.
        stacked = [(stage, block) for stage, _, block, count in self.stacks for _ in range(count)]
        numbers = [b for own in self.stages for b in range(len(own))]
        blocks = [(f"{stage}.block{b}", block) for (stage, block), b in zip(stacked, numbers, strict=True)]
        neck = [("neck", self.neck_part)] if self.neck_part else []
        return [*self.stem_parts(channels), *blocks, *neck, ("head", self.head_part)]

    def sized_parts(self, image_shape: tuple[int, ...]) -> list[tuple[str, Part, tuple[int, int]]]:
        """All parts in order, by name, each with the height and width of its input.

        Args:
          image_shape: (H, W, C) of one image.
        """
        parts, sizes, found = iter(self.parts(image_shape[-1])), self.map_sizes(image_shape), []

        def follow(count, size):
            for name, part in itertools.islice(parts, count):
                found.append((name, part, tuple(size)))
                size = part.output_size(*size)

        follow(len(self.stem_parts()), image_shape[:-1])
        for layer in self.layers:
            follow(len(layer.blocks), max(sizes[source] for source in layer.sources))
        follow(None, sizes[self.layers[-1].name])  # neck and head
        return found

    def map_sizes(self, image_shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
        """Height and width of what each stem and each stage makes, by its name.

        Args:
          image_shape: (H, W, C) of one image.
        """
        sizes: dict[str, tuple[int, int]] = {}
        height, width, channels = image_shape
        for name, part in self.stem_parts(channels):
            height, width = sizes[name] = part.output_size(height, width)
        for layer in self.layers:
            size = max(sizes[source] for source in layer.sources)
            for block in layer.blocks:
                size = block.output_size(*size)
            sizes[layer.name] = size
        return sizes

    @property
    def depth(self) -> int:
        """Blocks on the longest way from the images to the logits."""
        depths = dict.fromkeys((name for name, _ in self.stem_parts()), 0)
        for layer in self.layers:
            depths[layer.name] = max(depths[source] for source in layer.sources) + len(layer.blocks)
        return depths[self.layers[-1].name]

    @property
    def clip_bits(self) -> tuple[int, ...] | None:
        """Bits that have clips of their own, or None where one clip serves all."""
        return self.options.clip_bits

    @property
    def weight_bits(self) -> int | None:
        """Bits of the weights that the network was created with."""
        return self.options.weight_bits

    @property
    def act_bits(self) -> int | None:
        """Bits of the activations that the network was created with."""
        return self.options.act_bits

    @property
    def bits(self) -> Bits:
        """The bits that the network was created with."""
        return Bits(self.weight_bits, self.act_bits)

    def block_names(self, variables: Any = None, x: Any = None) -> list[str]:
        """Names of the blocks, in order, as `summary` has them."""
        del variables, x
        return [name for name, part in self.parts() if isinstance(part, Block)]

    def output_bias(self, variables: Any = None, x: Any = None) -> tuple[str, ...]:
        """Place in "params" of the bias that is added to the logits last."""
        del variables, x
        return ("head", "bias")

    def with_options(self, **changes: Any) -> Network:
        """This network with some options changed."""
        return self.clone(options=dataclasses.replace(self.options, **changes))

    def with_bits(self, bits: Bits) -> Network:
        """This network with other bits of its own, whole numbers or None."""
        return self.with_options(weight_bits=bits.weights, act_bits=bits.activations)

    def with_quantizers(self, bits: Bits, *, per_channel: bool = False) -> Network:
        """This full-precision network with quantizers, whose parameters keep their meaning.

        Weights are then rounded as they are, since standardizing would change the function, and block inputs that can
        be negative with their sign.

        Args:
          bits: whole numbers or None.
          per_channel: one weight clip for each output channel.
        """
        return self.with_options(
            standardize=False,
            per_channel=per_channel,
            signed_inputs=self.architecture.block.has_signed_inputs,
            weight_bits=bits.weights,
            act_bits=bits.activations,
        )

    def at_bits(self, variables: Mapping[str, Any], bits: Bits) -> tuple[Network, dict]:
        """Specialise an any-bit network, which has clips for each of its bits, to one number of bits.

        The function stays the same, and its twin is that function without rounding.

        Args:
          variables: Variables of this network.
          bits: whole numbers or None.
        Returns:
          The network, created with these widths and one clip for all, and its variables.
        """
        variables = unfreeze(dict(variables))
        params = dict(variables["params"])
        for stage, name, block, _ in self.stacks:
            own = params[stage][name]
            params[stage] = params[stage] | {name: own | jax.vmap(partial(block.clips_at, bits=bits))(own)}
        model = self.with_options(clip_bits=None, weight_bits=bits.weights, act_bits=bits.activations)
        return model, {**variables, "params": params}

    def bound_parts(self, variables: Mapping[str, Any], bits: Bits | None = None) -> list[BoundPart]:
        """The parts in order, each with its own variables and bits: called one after the other they are the network.

        Args:
          variables: Collections of this network.
          bits: Scalars, or one value for each block. Default: the network's own.
        """
        variables = unfreeze(dict(variables))
        bits = self.checked_bits(self.bits if bits is None else bits)

        def exact(part, name):
            own = {k: variables.get(k, {}).get(name, {}) for k in ("params", "batch_stats")}
            return BoundPart(part, own, 1.0, None, Bits())

        blocks = [BoundPart(*step, bits_of_block(bits, i)) for i, step in enumerate(self.steps(variables))]
        neck = [exact(self.neck_part, "neck")] if self.neck_part else []
        channels = variables["params"]["stem"]["kernel"].shape[2]
        stem = [exact(part, name) for name, part in self.stem_parts(channels)]
        return [*stem, *blocks, *neck, exact(self.head_part, "head")]

    def steps(self, variables: Mapping[str, Any]) -> list[tuple[Block, dict, float, Any]]:
        """The blocks one by one: (block, its own variables, step size, gamma2), what a block is called with.

        One that is not chosen for smoothing comes without it, and its gamma2 is None.
        """
        variables = unfreeze(dict(variables))
        found: list[tuple[Block, dict, Any, Any]] = []
        smoothing_scale = variables.get("smoothing", {}).get("scale")
        for stage, name, block, count in self.stacks:
            step_size = block.step_size if isinstance(block.step_size, float) else 1.0
            stacked = {k: v[stage][name] for k, v in variables.items() if name in v.get(stage, {})}
            for i in range(count):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
                gamma2 = gamma2_of(block.smoothing, own["params"], smoothing_scale, len(found), 1)
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
            f"{stage}/{name}/gamma2": (0.0, float(stencils.max_stable_step(eps=s.eps, kind=s.kind)))
            for stage, name, block, _ in self.stacks
            if (s := block.smoothing) is not None and s.learned
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
          power_iterations: Power iterations of every spectral norm, from the carried vector on. The vector moves where
            "spectral" is mutable.
        Returns:
          logits (N, num_classes), or (logits, tuple of states).
        Raises:
          ValueError: wrong rank, images that are not floating or smaller than `smallest_image`, bits per block of
            another number than blocks.
        """
        self._check_input(x)
        bits = self.checked_bits(self.bits if bits is None else bits)
        mode = Mode(train, momentum, observe, power_iterations, self.options.compute_dtype)

        x = self._exact("stem", self.stem_part(x.shape[-1]), jnp.asarray(x), mode)
        states: list[jax.Array] = []
        smoothing_scale: jax.Array | None = self.get_variable("smoothing", "scale")
        first = 0
        for i, blocks in enumerate(self.stages):
            stage = Stage(blocks, first, self.options.loop, self.options.remat, name=f"stage{i}")
            x, new = stage(x, bits, mode, smoothing_scale, return_states)
            states, first = states + new, first + len(blocks)
        if self.neck_part:
            x = self._exact("neck", self.neck_part, x, mode)
        logits = Pooled(self.head_part, name="head")(x, mode)
        return (logits, tuple(states)) if return_states else logits

    def _exact(self, name: str, part: ExactConv, x: jax.Array, mode: Mode) -> jax.Array:
        """The stem or the neck, with its variables."""
        params = self.param(name, lambda key: part.init(key)[0])
        held = {"batch_stats": self.variable("batch_stats", name, lambda: part.init(jax.random.key(0))[1])}
        variables = unfreeze({"params": params, "batch_stats": held["batch_stats"].value})
        x, updates = part(variables, x, 1.0, Bits(), mode)
        store(self, held, updates)
        return x

    def _check_input(self, x):
        if x.ndim != 4:
            raise ValueError(f"images must be (N, H, W, C); got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"images of dtype {x.dtype} must be floating: x.astype(jnp.float32), and scale them")
        side = self.smallest_image
        if any(size < side for size in x.shape[1:3]):
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} are too small for {self.architecture.name}: "
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


def bits_of_block(bits: Bits, index: int) -> Bits:
    """The bits of one block, scalars."""
    return Bits(*(v if v is None or jnp.ndim(v) == 0 else v[index] for v in bits))
