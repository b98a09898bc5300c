# SPDX-License-Identifier: Apache-2.0
"""Packing: nothing lost, nothing wasted, and the order of the bits that the layout promises."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kvq_jax import packing


@st.composite
def codes(draw):
    bits = draw(st.sampled_from(packing.BITS))
    # Few shapes: each is compiled anew.
    *batch, rows, channels = draw(st.sampled_from([(1, 1), (3, 5), (2, 1, 2, 64)]))
    shape = (*batch, rows * 32 // bits, channels)
    return bits, draw(npst.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))


@settings(deadline=None, max_examples=100)
@given(codes())
def test_unpack_undoes_pack(case):
    bits, code = case
    words = packing.pack(jnp.asarray(code), bits)
    assert words.dtype == jnp.uint32
    assert words.nbytes * 8 == code.size * bits
    unpacked = packing.unpack(words, bits)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, code)


@pytest.mark.parametrize("bits", packing.BITS)
def test_words_are_planar(bits):
    """Word row r holds the tokens r, r + R, r + 2R ... from its lowest bits up."""
    planes, rows, channels = 32 // bits, 3, 2
    code = np.random.default_rng(0).integers(0, 2**bits, (planes * rows, channels), np.uint8)
    words = np.asarray(packing.pack(jnp.asarray(code), bits))
    for token, channel in np.ndindex(*code.shape):
        plane, row = divmod(token, rows)
        field = int(words[row, channel]) >> (plane * bits) & (2**bits - 1)
        assert field == code[token, channel]


def test_refuses_what_does_not_fill_words():
    with pytest.raises(ValueError, match="17 tokens of 2 bits do not fill whole 32-bit words"):
        packing.pack(jnp.zeros((17, 4), jnp.uint8), 2)


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8\)"):
        packing.pack(jnp.zeros((32, 4), jnp.uint8), bits)
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8\)"):
        packing.unpack(jnp.zeros((1, 4), jnp.uint32), bits)
