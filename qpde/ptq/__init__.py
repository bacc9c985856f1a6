"""Post-training quantization: clips and biases from data, rescaled channels, bits for each block within a budget."""

from qpde.ptq.bit_allocation import allocate, block_bits, block_costs, sensitivity
from qpde.ptq.calibration import calibrate, correct_bias, quantize
from qpde.ptq.equalization import equalize

__all__ = ["allocate", "block_bits", "block_costs", "calibrate", "correct_bias", "equalize", "quantize", "sensitivity"]
