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
    dtype = np.uint8 if bits <= 8 else np.uint16
    shape = (*batch, rows * 32 // (bits & -bits), channels)
    return bits, draw(npst.arrays(dtype, shape, elements=st.integers(0, 2**bits - 1)))


@settings(deadline=None, max_examples=100)
@given(codes())
def test_unpack_undoes_pack(case):
    bits, code = case
    words = packing.pack(jnp.asarray(code), bits)
    assert words.dtype == jnp.uint32
    assert words.nbytes * 8 == code.size * bits
    unpacked = packing.unpack(words, bits)
    assert unpacked.dtype == code.dtype
    np.testing.assert_array_equal(unpacked, code)


@pytest.mark.parametrize("bits", packing.BITS)
def test_words_are_planar(bits):
    """Of each field, word row r holds the tokens r, r + R, r + 2R ... from its lowest bits up."""
    num_tokens, channels, dtype = 96, 2, np.uint8 if bits <= 8 else np.uint16
    code = np.random.default_rng(0).integers(0, 2**bits, (num_tokens, channels), dtype)
    words = np.asarray(packing.pack(jnp.asarray(code), bits))
    shift = 0
    for width in (w for w in (1, 2, 4, 8) if bits & w):
        rows = num_tokens * width // 32
        for token, channel in np.ndindex(*code.shape):
            plane, row = divmod(token, rows)
            field = int(words[row, channel]) >> (plane * width) & (2**width - 1)
            assert field == int(code[token, channel]) >> shift & (2**width - 1)
        words, shift = words[rows:], shift + width


@pytest.mark.parametrize("num_tokens, bits", [(17, 2), (16, 3), (8, 10)])
def test_refuses_what_does_not_fill_words(num_tokens, bits):
    message = f"{num_tokens} tokens of {bits} bits do not fill whole 32-bit words"
    with pytest.raises(ValueError, match=message):
        packing.pack(jnp.zeros((num_tokens, 4), jnp.uint8), bits)


@pytest.mark.parametrize("bits", [0, 11, 16])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        packing.pack(jnp.zeros((32, 4), jnp.uint8), bits)
    with pytest.raises(ValueError, match="bits must be one of"):
        packing.unpack(jnp.zeros((1, 4), jnp.uint32), bits)
