"""The networks by name, and `create`, which makes them: image networks here, graph networks from their builders."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qpde import stencils
from qpde.models.graphs.networks import GraphNetwork, gat, gcn, gcnii, pde_gcn
from qpde.models.images.blocks import (
    LIPSCHITZ_TARGET,
    NORMS,
    RESIDUALS,
    BasicBlock,
    Block,
    InvertedBlock,
    Smoothing,
    StableBlock,
)
from qpde.models.images.network import Network

__all__ = ["ARCHITECTURES", "GRAPH_NETWORKS", "Architecture", "create", "image_network", "names"]

LOOPS = ("auto", "scan", "unroll")
LEVELS = ("uniform", "pot", "apot")
COMPUTE_DTYPES = ("float32", "bfloat16")
HEADS = ("dense", "scaled")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of a network.

    Attributes:
      block: its kind.   stages: (width_in, width_out, blocks, stride, expansion) of each stage.
      neck_width: of a 1x1 convolution before the pooling, or None.
    """

    block: type[Block]
    stages: tuple[tuple[int, int, int, int, int], ...]
    neck_width: int | None = None


def _cifar(block: type[Block], blocks: int) -> Architecture:
    return Architecture(block, ((16, 16, blocks, 1, 1), (16, 32, blocks, 2, 1), (32, 64, blocks, 2, 1)))


def _imagenet(block: type[Block], blocks: tuple[int, int, int, int]) -> Architecture:
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    return Architecture(block, tuple((a, b, n, stride, 1) for (a, b, stride), n in zip(widths, blocks, strict=True)))


ARCHITECTURES = {
    "resnet20": _cifar(BasicBlock, 3),
    "resnet32": _cifar(BasicBlock, 5),
    "resnet44": _cifar(BasicBlock, 7),
    "resnet56": _cifar(BasicBlock, 9),
    "resnet110": _cifar(BasicBlock, 18),
    "resnet18": _imagenet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _imagenet(BasicBlock, (3, 4, 6, 3)),
    "stablenet20": _cifar(StableBlock, 3),
    "stablenet20x2": _cifar(StableBlock, 6),
    "stablenet56": _cifar(StableBlock, 9),
    "stablenet56x2": _cifar(StableBlock, 18),
    "stablenet34": _imagenet(StableBlock, (3, 4, 6, 3)),
    "mobilenetv2": Architecture(
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
}


GRAPH_NETWORKS = {"pde_gcn": pde_gcn, "gcn": gcn, "gcnii": gcnii, "gat": gat}


def names() -> tuple[str, ...]:
    """Names that `create` knows."""
    return (*ARCHITECTURES, *GRAPH_NETWORKS)


def create(name: str, **options: Any) -> Network | GraphNetwork:
    """A network by name, as a Flax Linen module.

    Args:
      name: one of `names()`.
      options: of `image_network`, or for a graph network of `pde_gcn`, `gcn`, `gcnii` or `gat`. All have
        num_classes (which must be given), weight_bits and act_bits.
    Returns:
      Module with `init(key, x)` and `apply(variables, x, train=..., bits=..., return_states=...)`, x being images
      (N, H, W, C) or a `jraph.GraphsTuple`.
    Raises:
      ValueError: an unknown name (the message lists the valid ones) or an option out of range.
    """
    if name in GRAPH_NETWORKS:
        return GRAPH_NETWORKS[name](**options)
    _known("name", name, dict.fromkeys(names()))
    return image_network(name, **options)


def image_network(
    name: str,
    *,
    num_classes: int,
    symmetric: bool = True,
    step_size: float | str = 0.1,
    lipschitz_target: float = LIPSCHITZ_TARGET,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    norm: str = "separate",
    residual: str = "rounded",
    levels: str = "uniform",
    standardize: bool = True,
    per_channel: bool = False,
    clip_bits: tuple[int, ...] | None = None,
    signed_inputs: bool = False,
    smoothing: Smoothing | None = None,
    head: str = "dense",
    loop: str = "auto",
    remat: bool = False,
    compute_dtype: str = "float32",
) -> Network:
    """An image classifier of the table, as a Flax Linen module.

    Args:
      name: a key of `ARCHITECTURES`.   num_classes: at least 1.
      symmetric: steps x - h K^T s(K x) with one kernel, instead of two kernels and h = 1. The first block of a
        stage stays plain in ResNets and MobileNets.
      step_size: h > 0 of the symmetric steps. "auto" holds h |D K|^2 at `lipschitz_target` by a power iteration that is
        carried in the collection "spectral"; it needs `norm="tied"`. With `norm="spectral"` h is 1 and this argument
        has no effect.
      lipschitz_target: h |D K|^2 of steps that find their own size, above 0 and at most 2. A step is non-expansive up to 2.
        How far it moves the features is proportional to this number, and so is what rounding adds, at clips to suit.
      weight_bits, act_bits: default widths, 2 to 32 (16 and more clip without rounding), or None for exact.
        `model.apply(..., bits=)` overrides them call by call.
      norm: of the symmetric steps: "separate" (published), "tied" or "spectral" (non-expansive, `qpde.models.blocks`).
      residual: "rounded", the shortcut takes Q(x) as published, or "precise", it takes clip(x).
      levels: of the quantizers: "uniform", "pot" or "apot".
      standardize: round (w - mean w) / std w, as published, the norm behind it taking up the scale. False rounds w
        itself: a network of weight_bits=None has its own w, and keeps its function when it is quantized.
      per_channel: a clip for each output channel of a kernel, instead of one for the kernel.
      clip_bits: widths, ascending, that have clips of their own, as a network that runs at all of them needs (Jin et
        al., AdaBits, CVPR 2020). A width in between takes those of the next one, `Network.at_bits` only one. None is
        one clip for all widths. The twin runs at 32 bits, so give them clips too.
      signed_inputs: MobileNet's block inputs can be negative; quantize them with a sign instead of clipping at 0.
      smoothing: total-variation smoothing, or None.
      head: what makes logits of the pooled features, "dense" or, after their division by their root mean square, one
        number, "scaled". Non-expansive steps shrink features, which this head can see nevertheless.
      loop: over the equal blocks of a stage: "scan" (compiles fast), "unroll", or "auto".
      remat: recompute each block in the backward pass instead of keeping its intermediates.
      compute_dtype: "float32", or "bfloat16" for the convolutions, their gradients and what they keep for them.
        Parameters, quantizers, norms, sums and the head stay float32.
    Returns:
      Module with `init(key, x)` and `apply(variables, x, train=..., bits=..., return_states=...)`, see `Network`.
    Raises:
      ValueError: an unknown name or option, a width outside 2..32, a step size or bound out of range.
    """
    architecture = _known("name", name, ARCHITECTURES)
    for option, value, valid in (
        ("norm", norm, NORMS),
        ("residual", residual, RESIDUALS),
        ("levels", levels, LEVELS),
        ("head", head, HEADS),
        ("loop", loop, LOOPS),
        ("compute_dtype", compute_dtype, COMPUTE_DTYPES),
    ):
        _known(option, value, dict.fromkeys(valid))
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    _check_bits("weight_bits", weight_bits)
    _check_bits("act_bits", act_bits)
    step_size = _checked_step_size(step_size, norm)
    if not 0 < lipschitz_target <= 2:
        raise ValueError(f"lipschitz_target (={lipschitz_target}) must be above 0 and at most 2: beyond, steps amplify")
    if signed_inputs and not architecture.block.has_signed_inputs:
        raise ValueError(f"signed_inputs is for networks whose block inputs can be negative (mobilenetv2), not {name}")
    if clip_bits is not None:
        clip_bits = _checked_clip_bits(clip_bits, weight_bits, act_bits)
    if smoothing is not None:
        _check_smoothing(smoothing, sum(stage[2] for stage in architecture.stages))

    def block(stage: tuple[int, int, int, int, int], index: int) -> Block:
        width_in, width_out, _, stride, expansion = stage
        first = index == 0
        return architecture.block(
            width_in=width_in if first else width_out,
            width_out=width_out,
            stride=stride if first else 1,
            symmetric=symmetric and (not first or architecture.block is StableBlock),
            expansion=expansion,
            norm=norm,
            residual=residual,
            levels=levels,
            standardize=standardize,
            per_channel=per_channel,
            clip_bits=clip_bits,
            signed_inputs=signed_inputs,
            step_size=step_size,
            lipschitz_target=float(lipschitz_target),
            smoothing=smoothing,
        )

    return Network(
        name_of_architecture=name,
        stages=tuple(tuple(block(stage, i) for i in range(stage[2])) for stage in architecture.stages),
        num_classes=num_classes,
        neck_width=architecture.neck_width,
        weight_bits=weight_bits,
        act_bits=act_bits,
        loop=loop,
        remat=remat,
        compute_dtype=compute_dtype,
        head=head,
    )


def _checked_clip_bits(widths, weight_bits, act_bits):
    if not widths or list(widths) != sorted({int(w) for w in widths}) or not 2 <= widths[0] <= widths[-1] <= 32:
        raise ValueError(f"clip_bits must be ascending whole numbers from 2 to 32, at least one; got {widths!r}")
    if weight_bits is None and act_bits is None:
        raise ValueError(
            f"clip_bits={widths!r} need quantizers: give weight_bits and act_bits, or leave clip_bits None"
        )
    return tuple(widths)


def _known(what, value, table):
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}; valid: {', '.join(table)}")
    return table[value]


def _check_bits(what, bits):
    if bits is not None and not 2 <= bits <= 32:
        raise ValueError(f"{what} must be 2 to 32, or None for full precision; got {bits}")


def _checked_step_size(step_size, norm):
    if step_size == "auto":
        if norm == "separate":
            raise ValueError(
                "step_size='auto' needs norm='tied' (or 'spectral'): with separate norms K^T s(K x) is no gradient, "
                "and no step size makes it non-expansive"
            )
        return step_size
    if isinstance(step_size, str) or not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be a positive number or 'auto'; got {step_size!r}")
    return float(step_size)


def _check_smoothing(smoothing, blocks):
    bound = stencils.max_stable_step(eps=smoothing.eps, kind=smoothing.kind)
    if not 0 <= smoothing.gamma2 <= bound:
        raise ValueError(
            f"smoothing.gamma2 must be within [0, {bound:g}] for kind={smoothing.kind!r}, eps={smoothing.eps:g} "
            f"(qpde.stencils.max_stable_step); got {smoothing.gamma2:g}"
        )
    outside = [i for i in smoothing.blocks or () if not 0 <= i < blocks]
    if outside:
        raise ValueError(f"smoothing.blocks names block {outside[0]}; the network has blocks 0 to {blocks - 1}")
