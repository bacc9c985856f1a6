"""Segmentation networks: an encoder of residual blocks, dilated where its map is to stay fine, and a decoder.

A network is a list of parts, but each stage of its decoder names the maps that it takes. They are brought to the
size of the largest by bilinear interpolation and stand side by side as channels:

    unet             a level for every map that is finer than the last: upsample, join, two convolutions
    deeplabv3plus    1x1, three dilated and one pooled branch on the last map (ASPP), joined, projected, and fused with
                     the map at stride 4 by two separable convolutions (Chen et al., 2018)

The head's logits are interpolated to the size of the image. Stem and head are in full precision.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qpde.models.images.architecture import Architecture, blocks_of_stage
from qpde.models.images.block import Block
from qpde.models.images.blocks import BasicBlock
from qpde.models.images.decoders import ConvBlock, PooledBlock, SeparableBlock
from qpde.models.images.network import Layer, Network
from qpde.models.images.parts import ExactConv, Head
from qpde.models.images.stages import Pooled, Stage
from qpde.models.layers import Mode, row

__all__ = [
    "DECODERS",
    "OUTPUT_STRIDES",
    "PixelHead",
    "SegmentationArchitecture",
    "SegmentationNetwork",
    "segmentation_architecture",
]

DECODERS = ("unet", "deeplabv3plus")
OUTPUT_STRIDES = (4, 8, 16, 32)

_SMALLEST_IMAGE = 32
_LOW_LEVEL_STRIDE = 4
_RATES, _RATES_STRIDE = (6, 12, 18), 16  # of ASPP, and the output stride that they are for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationArchitecture(Architecture):
    """Shape of a segmentation network: its encoder's, and how a decoder reads its maps.

    Attributes:
      decoder: "unet" or "deeplabv3plus".
      stem_stride: Stride of the stem: 1, 2, or 4 by two convolutions.
      output_stride: Stride of the encoder's last map. Strides beyond it are replaced by dilation.
      decoder_width: Channels of DeepLab's decoder. U-Net's levels have the width of the maps that they take.
    """

    decoder: str
    stem_stride: int
    output_stride: int
    decoder_width: int

    def __post_init__(self):
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder (={self.decoder!r}) must be one of {', '.join(DECODERS)}")
        if self.stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride (={self.stem_stride}) must be 1, 2 or 4")
        if self.output_stride not in OUTPUT_STRIDES:
            raise ValueError(
                f"output_stride (={self.output_stride}) must be one of {', '.join(map(str, OUTPUT_STRIDES))}"
            )
        reached = self.stem_stride * math.prod(stage[3] for stage in self.stages)
        least = self.stem_stride if self.decoder == "unet" else 2 * _LOW_LEVEL_STRIDE
        if not least <= self.output_stride <= reached:
            raise ValueError(
                f"output_stride (={self.output_stride}) of {self.name} must lie in {least} to {reached}, the stride "
                f"of its encoder with stem_stride={self.stem_stride}"
            )
        if self.decoder_width < 8:
            raise ValueError(f"decoder_width (={self.decoder_width}) must be at least 8")


class _Map(NamedTuple):
    """A map that a decoder can take: the stage that makes it, its stride and its channels."""

    name: str
    stride: int
    width: int


def segmentation_architecture(
    decoder: str,
    encoder: Architecture,
    *,
    stem_stride: int | None = None,
    output_stride: int | None = None,
    decoder_width: int = 256,
) -> SegmentationArchitecture:
    """The shape of a segmentation network over an encoder.

    Args:
      decoder: "unet" or "deeplabv3plus".
      encoder: A classifier's architecture, whose neck and head are left away.
      stem_stride: Stride of the stem, 1, 2 or 4. Default: what brings the encoder nearest to a stride of 32.
      output_stride: Stride of the encoder's last map, one of `OUTPUT_STRIDES`. Default: 16 for DeepLabV3+, the
        encoder's own for U-Net.
      decoder_width: Channels of DeepLab's decoder, at least 8.
    Raises:
      ValueError: A value out of range, or an output stride that the encoder does not reach.
    """
    own = math.prod(stage[3] for stage in encoder.stages)
    stem_stride = min(4, max(1, 32 // own)) if stem_stride is None else stem_stride
    if output_stride is None:
        output_stride = 16 if decoder == "deeplabv3plus" else stem_stride * own
    return SegmentationArchitecture(
        name=f"{decoder} over {encoder.name}",
        block=encoder.block,
        stages=encoder.stages,
        decoder=decoder,
        stem_stride=stem_stride,
        output_stride=output_stride,
        decoder_width=decoder_width,
    )


@dataclasses.dataclass(frozen=True)
class PixelHead(Head):
    """Dense layer for every pixel, in full precision: logits (N, H, W, classes)."""

    def output_shape(self, height, width):
        return height, width, self.width_out

    def macs(self, height, width):
        return {"kernel": height * width * self.width_in * self.width_out}

    def __call__(self, variables, x, step_size, bits, mode, gamma2=None):
        params = variables["params"]
        return x @ params["kernel"] + row(params["bias"]), {}


class SegmentationNetwork(Network):
    """Network with a class for every pixel. Make one with `qpde.models.create("unet", ...)` or "deeplabv3plus".

    Attributes:
      architecture: Its shape, a `SegmentationArchitecture`.
      num_classes: Number of classes.
      options: All its options.
    """

    architecture: SegmentationArchitecture

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Stages of the encoder, then those of the decoder, each with the maps that it takes."""
        return (*self._encoder, *_DECODE[self.architecture.decoder](self))

    @functools.cached_property
    def _encoder(self) -> tuple[Layer, ...]:
        stride, dilation = self.architecture.stem_stride, 1
        source, found = self.stem_parts()[-1][0], []
        fields = {field.name for field in dataclasses.fields(self.architecture.block)}
        padded = {"padded": True} if "padded" in fields else {}
        for i, stage in enumerate(self.architecture.stages):
            before, own = dilation, stage[3]
            if stride * own > self.architecture.output_stride:
                dilation, own = dilation * own, 1
            stride *= own
            blocks = blocks_of_stage(
                self.architecture.block,
                (*stage[:3], own, stage[4]),
                self.options,
                first={"dilation": before},
                dilation=dilation,
                dilation_after=dilation,
                **padded,
            )
            found.append(Layer(f"stage{i}", (source,), blocks))
            source = f"stage{i}"
        return tuple(found)

    @functools.cached_property
    def maps(self) -> tuple[_Map, ...]:
        """The maps of stems and encoder, in order."""
        stride, found = 1, []
        for name, part in self.stem_parts():
            stride *= part.stride
            found.append(_Map(name, stride, part.width_out))
        for name, _, blocks in self._encoder:
            stride *= math.prod(block.stride for block in blocks)
            found.append(_Map(name, stride, blocks[-1].width_out))
        return tuple(found)

    @functools.cached_property
    def stages(self) -> tuple[tuple[Block, ...], ...]:
        return tuple(layer.blocks for layer in self.layers)

    def stem_parts(self, channels: int = 3) -> list[tuple[str, ExactConv]]:
        width, stride = self.architecture.stages[0][0], self.architecture.stem_stride
        first = ("stem", ExactConv(channels, width, 3, "conv1", "bn1", min(stride, 2)))
        return [first] if stride < 4 else [first, ("stem2", ExactConv(width, width, 3, "conv2", "bn2", 2))]

    @property
    def head_part(self) -> PixelHead:
        return PixelHead(self.layers[-1].blocks[-1].width_out, self.num_classes)

    @property
    def smallest_image(self) -> int:
        return _SMALLEST_IMAGE

    @nn.compact
    def __call__(
        self, x, *, train=False, bits=None, return_states=False, momentum=0.9, observe=None, power_iterations=1
    ):
        """Logits of every pixel.

        Args:
          x: (N, H, W, C) float32, H and W at least 32.
          train: As for `Network`.
          bits: As for `Network`; one value for each block counts those of the decoder too.
          return_states: Also return the blocks' outputs, in order.
          momentum: As for `Network`.
          observe: As for `Network`.
          power_iterations: As for `Network`.
        Returns:
          logits (N, H, W, num_classes), or (logits, tuple of states).
        Raises:
          ValueError: As `Network`.
        """
        self._check_input(x)
        bits = self.checked_bits(self.bits if bits is None else bits)
        mode = Mode(train, momentum, observe, power_iterations, self.options.compute_dtype)
        size, maps = (x.shape[1], x.shape[2]), {}
        for name, part in self.stem_parts(x.shape[-1]):
            maps[name] = x = self._exact(name, part, x, mode)
        states: list[jax.Array] = []
        smoothing_scale: jax.Array | None = self.get_variable("smoothing", "scale")
        first = 0
        for name, sources, blocks in self.layers:
            stage = Stage(blocks, first, self.options.loop, self.options.remat, name=name)
            x, new = stage(join([maps[source] for source in sources]), bits, mode, smoothing_scale, return_states)
            maps[name], states, first = x, states + new, first + len(blocks)
        logits = resize(Pooled(self.head_part, name="head")(x, mode), size)
        return (logits, tuple(states)) if return_states else logits


def _unet(network: SegmentationNetwork) -> list[Layer]:
    """From coarse to fine a level for the last map of every stride, with its width."""
    *finer, (source, stride, width) = network.maps
    skips = {skip.stride: skip for skip in finer if skip.stride < stride}
    found = []
    for i, skip in enumerate(sorted(skips.values(), key=lambda skip: -skip.stride)):
        shared = network.options.of_blocks | {"signed_inputs": False}
        joined = ConvBlock(width_in=skip.width + width, width_out=skip.width, **network.options.of_blocks)
        widths: dict[str, Any] = {"width_in": skip.width, "width_out": skip.width}
        if network.options.symmetric:
            second: Block = BasicBlock(**widths, stride=1, symmetric=True, **shared)
        else:
            second = ConvBlock(**widths, **shared)
        found.append(Layer(f"up{i}", (skip.name, source), (joined, second)))
        source, width = f"up{i}", skip.width
    return found


def _deeplabv3plus(network: SegmentationNetwork) -> list[Layer]:
    width, of_encoder = network.architecture.decoder_width, network.options.of_blocks
    inside = of_encoder | {"signed_inputs": False}
    last = network.maps[-1]
    low = [found for found in network.maps if found.stride <= _LOW_LEVEL_STRIDE][-1]
    low_width = max(8, 3 * width // 16)
    rates = [rate * _RATES_STRIDE // network.architecture.output_stride for rate in _RATES]
    widths: dict[str, Any] = {"width_in": last.width, "width_out": width}
    branches = [
        ConvBlock(**widths, taps=1, **of_encoder),
        *(SeparableBlock(**widths, dilation=rate, **of_encoder) for rate in rates),
        PooledBlock(**widths, **of_encoder),
    ]
    names = [f"aspp{i}" for i in range(len(branches))]
    return [
        *(Layer(name, (last.name,), (branch,)) for name, branch in zip(names, branches, strict=True)),
        Layer(
            "project",
            tuple(names),
            (ConvBlock(width_in=width * len(branches), width_out=width, taps=1, **inside),),
        ),
        Layer("low", (low.name,), (ConvBlock(width_in=low.width, width_out=low_width, taps=1, **of_encoder),)),
        Layer(
            "fuse",
            ("project", "low"),
            (
                SeparableBlock(width_in=width + low_width, width_out=width, **inside),
                SeparableBlock(width_in=width, width_out=width, **inside),
            ),
        ),
    ]


_DECODE = {"unet": _unet, "deeplabv3plus": _deeplabv3plus}


def join(maps: Sequence[Float[Array, "n _ _ _"]]) -> Float[Array, "n h w c"]:
    """Maps side by side as channels, all at the size of the largest."""
    size = max((x.shape[1], x.shape[2]) for x in maps)
    return maps[0] if len(maps) == 1 else jnp.concatenate([resize(x, size) for x in maps], axis=-1)


def interpolation(size: int, size_out: int) -> np.ndarray:
    """Weights of `resize` along one axis, float64 (size_out, size): not negative, and those of an output sum to 1.

    Args:
      size: Number of pixels.
      size_out: Number of pixels that they become, not smaller.
    """
    places = np.clip((np.arange(size_out) + 0.5) * size / size_out - 0.5, 0, size - 1)
    return np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(size)))


def resize(x: Float[Array, "n h w c"], size: tuple[int, int]) -> Float[Array, "n h_out w_out c"]:
    """Bilinear interpolation to a size that is not smaller; corners of pixels, not their centres, lie on each other."""
    if x.shape[1:3] == tuple(size):
        return x
    shape: tuple[Any, ...] = (x.shape[0], *size, x.shape[3])
    if x.shape[1:3] == (1, 1):
        return jnp.broadcast_to(x, shape)
    return jax.image.resize(x, shape, "bilinear")
