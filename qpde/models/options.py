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
    """Diffusivity: a name of `qpde.stencils.tv_step`."""
    steps: int = 1
    """Explicit steps."""
    gamma2: float = 0.025
    """Size of a step; at most `qpde.stencils.max_stable_step`."""
    eps: float = 0.1
    """Width of the quadratic part of the energy sqrt(|grad x|^2 + eps^2)."""
    blocks: tuple[int, ...] | None = None
    """Indices of the blocks that smooth, counted through the network. None: all of them."""
    output: bool = False
    """Smooth the block's output too (the next block's quantizer input), not only the hidden map."""
    learned: bool = False
    """Each block that smooths has a parameter gamma2 of its own, which starts at the one given."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """How a block normalises, rounds and smooths."""

    norm: Literal["separate", "tied", "spectral"] = "separate"
    """Norm of the symmetric steps: "separate" (published), "tied" or "spectral" (both non-expansive)."""
    residual: Literal["rounded", "precise"] = "rounded"
    """Input of the shortcut: the rounded activation, as published, or the one that is only clipped."""
    levels: Levels = "uniform"
    """Values that quantized numbers take: evenly spaced, or (sums of) powers of two."""
    standardize: bool = True
    """Round kernels after giving them mean 0 and variance 1; the norm behind takes up the scale. Off for a network that
    was trained in full precision and is to keep its function."""
    per_channel: bool = False
    """A clip for each output channel of a kernel, instead of one for the kernel."""
    clip_bits: tuple[int, ...] | None = None
    """Bits that have clips of their own, ascending, for a network that serves at all of them (Jin et al., AdaBits, CVPR
    2020). Bits in between take the clips of the next one. The twin runs at 32 bits, so give these clips too. None: one
    clip for all."""
    signed_inputs: bool = False
    """MobileNet's block inputs, which can be negative, are quantized with a sign, not clipped at 0 as published."""
    step_size: float | Literal["auto"] = 0.1
    """h of the symmetric step x - h K^T s(K x). "auto" holds h |D K|^2 at `lipschitz_target` by a power iteration that
    is carried in the collection "spectral"; it needs the tied norm. With the spectral norm h is 1."""
    lipschitz_target: float = LIPSCHITZ_TARGET
    """h |D K|^2 of steps that find their own size (norm "spectral", or step_size "auto"), above 0 and at most 2, up to
    which a step is non-expansive. How far a step moves the features is proportional to it."""
    smoothing: Smoothing | None = None
    """Total-variation smoothing before the activations' quantizers."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(BlockOptions):
    """Everything about an image network but its architecture and its number of classes."""

    symmetric: bool = True
    """Steps x - h K^T s(K x) with one kernel, instead of two kernels and h = 1. The first block of a stage stays plain
    in ResNets and MobileNets."""
    weight_bits: int | None = None
    """Bits of the kernels, 2 to 32 (16 and more clip without rounding). None: exact."""
    act_bits: int | None = None
    """Bits of the activations, 2 to 32 (16 and more clip without rounding). None: exact."""
    head: Literal["dense", "scaled"] = "dense"
    """Logits of the pooled features by a dense layer ("dense"), or after division by their root mean square ("scaled").
    Non-expansive steps shrink features; the scaled head sees them nevertheless."""
    loop: Literal["auto", "scan", "unroll"] = "auto"
    """How the equal blocks of a stage are run: "scan" compiles fast."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the convolutions and of what their gradients keep. Parameters, quantizers, norms, sums and the head stay
    float32. bfloat16 is for GPUs and TPUs."""

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


def check_choices(options: dict[str, Any]) -> None:
    """ValueError for an option of `NetworkOptions` that does not exist, or whose value is none of its choices."""
    known = [field.name for field in dataclasses.fields(NetworkOptions)]
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
