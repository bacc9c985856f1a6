"""qpde: networks that survive quantization, built as partial differential equations, in JAX."""
