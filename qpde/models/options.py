"""Options of image networks, documented once: `create`, the blocks and the application's configuration use these."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from qpde import stencils
from qpde.bits import LARGEST_BITS, SMALLEST_BITS
from qpde.quantizers import LEVEL_SETS, Levels
from qpde.suggestions import did_you_mean

__all__ = ["BlockOptions", "NetworkOptions", "Smoothing"]

LIPSCHITZ_TARGET = 1.9  # as far from 2 as a power iteration's |D K|, which is a bit low, asks for


@dataclass(frozen=True)
class Smoothing:
    """Total-variation smoothing after the nonlinearities of a block, before their quantizers."""

    kind: str = "isotropic"
    """Kind of diffusivity, a name that `qpde.stencils.tv_step` knows."""
    steps: int = 1
    """Number of explicit steps."""
    gamma2: float = 0.025
    """Size of a step, at most `qpde.stencils.max_stable_step`."""
    eps: float = 0.1
    """Width of the quadratic part of the energy sqrt(|grad x|^2 + eps^2)."""
    blocks: tuple[int, ...] | None = None
    """Indices of the blocks that smooth, counted through the network. None: all of them."""
    output: bool = False
    """Also smooth the block's output, which the next block quantizes, and not only its hidden map."""
    learned: bool = False
    """Train gamma2: each block that smooths has its own, which starts at the value given."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How a block normalises, rounds and smooths."""

    norm: Literal["separate", "tied", "spectral"] = "separate"
    """Norm of the symmetric steps: "separate" (published), "tied" or "spectral" (both non-expansive)."""
    residual: Literal["rounded", "precise"] = "rounded"
    """Input of the shortcut: the rounded activation, as published, or the activation before rounding."""
    levels: Levels = "uniform"
    """Spacing of the quantized values: even, powers of two (pot), or sums of powers of two (apot)."""
    standardize: bool = True
    """Give kernels mean 0 and variance 1 before they are rounded; the norm that follows restores the scale. Turn it off
    to quantize a network that was trained in full precision."""
    per_channel: bool = False
    """Give each output channel of a kernel a clip of its own. Otherwise the kernel has one clip."""
    clip_bits: tuple[int, ...] | None = None
    """Bits with clips of their own, ascending, for one network that runs at all of them (Jin et al., AdaBits, CVPR
    2020). Other bits use the clips of the next larger ones. Include 32, at which the twin runs. None: one clip for
    all bits."""
    signed_inputs: bool = False
    """Quantize the inputs of MobileNet's blocks, which can be negative, with a sign. As published they are clipped at
    0."""
    step_size: float | Literal["auto"] = 0.1
    """h of the symmetric step x - h K^T s(K x). With "auto" each step finds its own h, so that h |D K|^2 is
    `lipschitz_target`; this needs the tied norm. With the spectral norm h is 1."""
    lipschitz_target: float = LIPSCHITZ_TARGET
    """h |D K|^2 of the steps that find their own size (norm "spectral", or step_size "auto"). Above 0 and at most 2, up
    to which a step is non-expansive. A smaller one moves the features less."""
    smoothing: Smoothing | None = None
    """Total-variation smoothing before the activations' quantizers."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(BlockOptions):
    """Everything about an image network but its architecture and its number of classes."""

    symmetric: bool = True
    """Use symmetric steps x - h K^T s(K x) with one kernel, instead of two kernels and h = 1. In ResNets and MobileNets
    the first block of a stage stays plain."""
    expansion: float = 1.0
    """Channels of K x in the symmetric steps, as a multiple of the architecture's own, which has as many as x has, or
    six times as many in MobileNetV2. With 2 a symmetric block of a ResNet has the parameters of a plain one."""
    weight_bits: int | None = None
    """Bits of the kernels, 2 to 32 (16 and more clip without rounding). None: exact."""
    act_bits: int | None = None
    """Bits of the activations, 2 to 32 (16 and more clip without rounding). None: exact."""
    head: Literal["dense", "scaled"] = "dense"
    """How the pooled features become logits: by a dense layer ("dense"), or by one after division by their root mean
    square ("scaled"). Non-expansive steps shrink features, and "scaled" makes up for it."""
    loop: Literal["auto", "scan", "unroll"] = "auto"
    """How the equal blocks of a stage are compiled: as a loop ("scan", compiles fast), or one by one ("unroll")."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the convolutions; bfloat16 is for GPUs and TPUs. Parameters, quantizers, norms, sums and the head stay
    float32."""

    def checked(self, *, num_classes: int, blocks: int, has_signed_inputs: bool, name: str) -> NetworkOptions:
        """These options, their numbers as Python's, after all of them were found to fit a network.

        Args:
          num_classes: Classes of the network.
          blocks: Number of its blocks.
          has_signed_inputs: Whether the inputs of its blocks can be negative.
          name: Its architecture, for messages.
        Raises:
          ValueError: An option is unknown or out of range; names it, its value and the limit.
        """
        check_choices({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}")
        for option in ("weight_bits", "act_bits"):
            bits = getattr(self, option)
            if bits is not None and not SMALLEST_BITS <= bits <= LARGEST_BITS:
                raise ValueError(f"{option} must be 2 to 32, or None for full precision; got {bits}")
        if not 0 < self.lipschitz_target <= 2:
            raise ValueError(
                f"lipschitz_target (={self.lipschitz_target}) must be above 0 and at most 2: beyond, steps amplify"
            )
        if self.signed_inputs and not has_signed_inputs:
            raise ValueError(
                f"signed_inputs is for networks whose block inputs can be negative (mobilenetv2), not {name}"
            )
        if self.smoothing is not None:
            _check_smoothing(self.smoothing, blocks)
        return dataclasses.replace(
            self,
            expansion=float(self.expansion),
            step_size=_checked_step_size(self.step_size, self.norm),
            lipschitz_target=float(self.lipschitz_target),
            clip_bits=_checked_clip_bits(self.clip_bits, self.weight_bits, self.act_bits),
        )

    @property
    def of_blocks(self) -> dict[str, Any]:
        """The options of `BlockOptions`, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockOptions)}


_CHOICES = {
    "norm": ("separate", "tied", "spectral"),
    "residual": ("rounded", "precise"),
    "levels": tuple(LEVEL_SETS),
    "head": ("dense", "scaled"),
    "loop": ("auto", "scan", "unroll"),
    "compute_dtype": ("float32", "bfloat16"),
}


def check_choices(options: dict[str, Any], *more: str) -> None:
    """ValueError for an option that does not exist, or whose value is none of its choices.

    Args:
      options: Options by name.
      more: Names that exist beside the fields of `NetworkOptions`.
    """
    known = [*(field.name for field in dataclasses.fields(NetworkOptions)), *more]
    for option, value in options.items():
        check_known("option", option, known)
        if option in _CHOICES:
            check_known(option, value, _CHOICES[option])
    if isinstance(options.get("step_size"), str) and options["step_size"] != "auto":
        raise ValueError(f"step_size must be a positive number or 'auto'; got {options['step_size']!r}")


def check_known(what: str, value: Any, valid: Any) -> None:
    """ValueError for a value that is none of the valid ones; lists them."""
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}; {did_you_mean(str(value), valid)}valid: {', '.join(valid)}")


def _checked_clip_bits(bits, weight_bits, act_bits):
    if bits is None:
        return None
    if not bits or list(bits) != sorted({int(b) for b in bits}) or not 2 <= bits[0] <= bits[-1] <= 32:
        raise ValueError(f"clip_bits must be ascending whole numbers from 2 to 32, at least one; got {bits!r}")
    if weight_bits is None and act_bits is None:
        raise ValueError(f"clip_bits={bits!r} need quantizers: give weight_bits and act_bits, or leave clip_bits None")
    return tuple(bits)


def _checked_step_size(step_size, norm):
    if step_size == "auto":
        if norm == "separate":
            raise ValueError(
                "step_size='auto' needs norm='tied' (or 'spectral'): with separate norms K^T s(K x) is no gradient, "
                "and no step size makes it non-expansive"
            )
        return step_size
    if not (step_size > 0 and math.isfinite(step_size)):
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
