"""Packed codes come back as they were."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpde.deploy.packing import PACKED_BITS, pack, packed_size, unpack, unpack_traced


@given(bits=st.sampled_from(PACKED_BITS), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_codes_come_back(bits, count, seed):
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, count).astype(np.int8)
    data = pack(codes, bits)
    assert data.size == packed_size(count, bits) == -(-count * bits // 8)
    np.testing.assert_array_equal(unpack(data, bits, (count,)), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("count", [1, 7, 24, 61])
def test_the_jax_program_unpacks_the_same(bits, count):
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(count).integers(-half, half, count).astype(np.int8)
    np.testing.assert_array_equal(unpack_traced(pack(codes, bits), bits, (count,)), codes)


def test_the_first_code_is_in_the_low_bits_in_twos_complement():
    assert pack(np.array([1, -1, 0, 1], np.int8), 2).tolist() == [0b01_00_11_01]
    assert pack(np.array([3, -4, -1], np.int8), 3).tolist() == [0b11_100_011, 0b1]
    assert pack(np.array([5, -8], np.int8), 4).tolist() == [0b1000_0101]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit 2 bits"):
        pack(np.array([2], np.int8), 2)
    with pytest.raises(ValueError, match="bits=5 cannot be packed"):
        pack(np.array([2], np.int8), 5)
    with pytest.raises(ValueError, match="take 2 bytes, not 3"):
        unpack(np.zeros(3, np.uint8), 4, (4,))
    with pytest.raises(ValueError, match="behind the last code must be 0"):
        unpack(np.array([0xF1], np.uint8), 4, (1,))
