"""The widths a network runs at."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Bits"]

_EXACT_BITS = 32  # any number from 16 on


class Bits(NamedTuple):
    """Widths of a network's quantizers; a pytree, so its values may be traced and changing them never recompiles.

    `None` takes a quantizer out (exact weights, unclipped activations). A scalar holds for every block; an
    array with one value per block gives each block its own. Widths are 2 to 32; from 16 on a quantizer
    clips and does not round, which makes the `twin` of a network.

    Attributes:
      weights: of the convolution kernels inside blocks: None, scalar or (blocks,).
      activations: of the feature maps inside blocks: None, scalar or (blocks,).
    """

    weights: Any = None
    activations: Any = None

    @property
    def twin(self) -> "Bits":
        """Of the high-precision twin, whose activations are clipped and not rounded: 32 bits in the form of the given
        ones, so that both networks share one compiled program.
        """

        def exact(width):
            return jnp.full_like(width, _EXACT_BITS) if hasattr(width, "dtype") else _EXACT_BITS

        return self._replace(activations=jax.tree.map(exact, self.activations))
