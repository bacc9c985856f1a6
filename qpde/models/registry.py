"""The networks by name, and `create`, which makes them: image networks here, graph networks from their builders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpde.models.graphs.networks import GraphNetwork, gat, gcn, gcnii, pde_gcn
from qpde.models.images.architecture import Architecture
from qpde.models.images.block import Block
from qpde.models.images.blocks import BasicBlock, InvertedBlock, StableBlock
from qpde.models.images.network import Network
from qpde.models.images.segmentation import (
    DECODERS,
    SegmentationArchitecture,
    SegmentationNetwork,
    segmentation_architecture,
)
from qpde.models.options import NetworkOptions, check_choices, check_known

__all__ = ["ARCHITECTURES", "BLOCKS", "GRAPH_NETWORKS", "create", "image_network", "names", "segmentation_network"]


def _cifar(name: str, block: type[Block], blocks: int) -> Architecture:
    return Architecture(name, block, ((16, 16, blocks, 1, 1), (16, 32, blocks, 2, 1), (32, 64, blocks, 2, 1)))


def _imagenet(name: str, block: type[Block], blocks: tuple[int, int, int, int]) -> Architecture:
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    return Architecture(
        name, block, tuple((a, b, n, stride, 1) for (a, b, stride), n in zip(widths, blocks, strict=True))
    )


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _cifar("resnet20", BasicBlock, 3),
        _cifar("resnet32", BasicBlock, 5),
        _cifar("resnet44", BasicBlock, 7),
        _cifar("resnet56", BasicBlock, 9),
        _cifar("resnet110", BasicBlock, 18),
        _imagenet("resnet18", BasicBlock, (2, 2, 2, 2)),
        _imagenet("resnet34", BasicBlock, (3, 4, 6, 3)),
        _cifar("stablenet20", StableBlock, 3),
        _cifar("stablenet20x2", StableBlock, 6),
        _cifar("stablenet56", StableBlock, 9),
        _cifar("stablenet56x2", StableBlock, 18),
        _imagenet("stablenet34", StableBlock, (3, 4, 6, 3)),
        Architecture(
            "mobilenetv2",
            InvertedBlock,
            (
                (16, 16, 1, 1, 1),
                (16, 24, 2, 1, 6),
                (24, 32, 3, 2, 6),
                (32, 64, 4, 2, 6),
                (64, 96, 3, 1, 6),
                (96, 160, 3, 2, 6),
                (160, 320, 1, 1, 6),
            ),
            neck_width=1280,
        ),
    )
}
"""The image networks by name. A new one is one row."""

BLOCKS = {"basic": BasicBlock, "stable": StableBlock, "inverted": InvertedBlock}
"""The kinds of blocks by name."""

GRAPH_NETWORKS: dict[str, Callable[..., GraphNetwork]] = {"pde_gcn": pde_gcn, "gcn": gcn, "gcnii": gcnii, "gat": gat}

_OF_IMAGES = ("num_classes", "width")  # arguments of `image_network` beside the fields of `NetworkOptions`


def names() -> tuple[str, ...]:
    """Names that `create` knows."""
    return (*ARCHITECTURES, *DECODERS, *GRAPH_NETWORKS)


def create(name: str, **options: Any) -> Network | GraphNetwork:
    """A network by name, as a Flax Linen module.

    Args:
      name: One of `names()`.
      options: `num_classes`, which must be given, and those of `image_network`; for "unet" and "deeplabv3plus" those of
        `segmentation_network`; for a graph network the arguments of `pde_gcn`, `gcn`, `gcnii` or `gat`.
    Returns:
      Module with `init(key, x)` and `apply(variables, x, train=..., bits=..., return_states=...)`, x being images
      (N, H, W, C) or a `jraph.GraphsTuple`.
    Raises:
      ValueError: An unknown name (the message lists the valid ones), or an option out of range.
    """
    if name in GRAPH_NETWORKS:
        return GRAPH_NETWORKS[name](**options)
    check_known("name", name, names())
    if name in DECODERS:
        return segmentation_network(name, **options)
    return image_network(ARCHITECTURES[name], **options)


def image_network(architecture: Architecture, *, num_classes: int, width: float = 1.0, **options: Any) -> Network:
    """An image network of any architecture, as a Flax Linen module.

    Args:
      architecture: Its shape; those with names are in `ARCHITECTURES`.
      num_classes: Number of classes, at least 1.
      width: Multiplier of its channels, see `Architecture.with_width`.
      options: Fields of `NetworkOptions`, which documents them.
    Returns:
      Module with `init(key, x)` and `apply(variables, x, train=..., bits=..., return_states=...)`, see `Network`.
    Raises:
      ValueError: An option is unknown or out of range.
    """
    check_choices(options, *_OF_IMAGES)
    if isinstance(architecture, SegmentationArchitecture) and options.get("head", "dense") != "dense":
        raise ValueError(f"head (={options['head']!r}) of {architecture.name} must be 'dense'")
    kind: Any = SegmentationNetwork if isinstance(architecture, SegmentationArchitecture) else Network
    model = kind(architecture.with_width(width), num_classes, NetworkOptions(**options))
    checked = model.options.checked(
        num_classes=num_classes,
        blocks=len(model.blocks),
        has_signed_inputs=architecture.block.has_signed_inputs,
        name=architecture.name,
    )
    return model.clone(options=checked)


def segmentation_network(
    decoder: str,
    *,
    num_classes: int,
    encoder: str = "resnet18",
    stem_stride: int | None = None,
    output_stride: int | None = None,
    decoder_width: int = 256,
    **options: Any,
) -> Network:
    """A segmentation network, as a Flax Linen module, whose logits are (N, H, W, num_classes).

    Args:
      decoder: "unet" or "deeplabv3plus".
      num_classes: Number of classes, at least 1.
      encoder: Name of an image network, whose blocks it has.
      stem_stride: See `qpde.models.images.segmentation.segmentation_architecture`.
      output_stride: See there.
      decoder_width: See there.
      options: Others of `image_network`. The head is "dense".
    Raises:
      ValueError: An option is unknown or out of range, or a stride that the encoder does not reach.
    """
    check_known("encoder", encoder, ARCHITECTURES)
    check_choices(options, *_OF_IMAGES, "encoder", "stem_stride", "output_stride", "decoder_width")
    architecture = segmentation_architecture(
        decoder,
        ARCHITECTURES[encoder],
        stem_stride=stem_stride,
        output_stride=output_stride,
        decoder_width=decoder_width,
    )
    return image_network(architecture, num_classes=num_classes, **options)
