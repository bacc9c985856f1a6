"""The widths a network runs at."""

from typing import Any, NamedTuple

__all__ = ["Bits"]


class Bits(NamedTuple):
    """Widths of a network's quantizers; a pytree, so its values may be traced and changing them never recompiles.

    `None` takes a quantizer out (exact weights, unclipped activations). A scalar holds for every block; an
    array with one value per block gives each block its own. Widths are 2 to 32; from 16 on a quantizer
    clips and does not round, so `bits._replace(activations=32)` is the high-precision twin of a network.

    Attributes:
      weights: of the convolution kernels inside blocks: None, scalar or (blocks,).
      activations: of the feature maps inside blocks: None, scalar or (blocks,).
    """

    weights: Any = None
    activations: Any = None
