# SPDX-License-Identifier: Apache-2.0
"""Codes of a few bits in 32-bit words, without a bit to spare."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

WORD_BITS = 32
BITS = (2, 4, 8)


def pack(code: UInt8[Array, "*d S H"], bits: int) -> UInt32[Array, "*d R H"]:
    """Packs codes along the token axis; R = S * bits / 32.

    Planar: word row r holds the tokens r, r + R, r + 2R ... from its lowest bits up, so that
    unpacking is one shift for a whole plane of rows and needs no shuffle.

    Args:
      code: values below 2**bits; S must be a multiple of 32 / bits.
      bits: 2, 4 or 8.
    """
    planes = _planes(bits)
    *batch, num_tokens, head_dim = code.shape
    if num_tokens % planes:
        raise ValueError(f"{num_tokens} tokens of {bits} bits do not fill whole 32-bit words")
    code = code.reshape(*batch, planes, num_tokens // planes, head_dim).astype(jnp.uint32)
    shift = (jnp.arange(planes, dtype=jnp.uint32) * bits)[:, None, None]
    # The fields don't overlap, so their sum is their union.
    return (code << shift).sum(-3, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*d R H"], bits: int) -> UInt8[Array, "*d S H"]:
    """Undoes `pack`."""
    planes = _planes(bits)
    *batch, rows, head_dim = words.shape
    shift = (jnp.arange(planes, dtype=jnp.uint32) * bits)[:, None, None]
    code = (words[..., None, :, :] >> shift) & jnp.uint32(2**bits - 1)
    return code.reshape(*batch, planes * rows, head_dim).astype(jnp.uint8)


def _planes(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    return WORD_BITS // bits
