# SPDX-License-Identifier: Apache-2.0
"""Codes of a few bits in 32-bit words, without a bit to spare.

A code of 1, 2, 4 or 8 bits is a field of a word. Any other width is the sum of such fields, as
its binary digits say: 3 is 2 + 1, 5 is 4 + 1, 10 is 8 + 2. The words of the narrowest fields, which
hold the lowest bits of the codes, come first.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt16, UInt32

WORD_BITS = 32
BITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def pack(
    code: UInt8[Array, "*d S H"] | UInt16[Array, "*d S H"], bits: int
) -> UInt32[Array, "*d R H"]:
    """Packs codes along the token axis; R = S * bits / 32.

    Planar: of the R word rows of a field, row r holds the tokens r, r + R, r + 2R ... from its
    lowest bits up, so that unpacking is one shift for a whole plane of rows and needs no shuffle.

    Args:
      code: values below 2**bits; S must fill whole words with each field.
      bits: 1 to 10.
    """
    widths = _fields(bits)
    if code.shape[-2] * widths[0] % WORD_BITS:
        raise ValueError(f"{code.shape[-2]} tokens of {bits} bits do not fill whole 32-bit words")
    words, shift = [], 0
    for width in widths:
        field = (code.astype(jnp.uint32) >> shift) & jnp.uint32(2**width - 1)
        words.append(_pack_field(field, width))
        shift += width
    return jnp.concatenate(words, -2)


def unpack(
    words: UInt32[Array, "*d R H"], bits: int
) -> UInt8[Array, "*d S H"] | UInt16[Array, "*d S H"]:
    """Undoes `pack`; codes of up to 8 bits are uint8."""
    code, shift, row = None, 0, 0
    for width in _fields(bits):
        rows = words.shape[-2] * width // bits
        field = _unpack_field(words[..., row : row + rows, :], width) << shift
        code = field if code is None else code | field
        shift, row = shift + width, row + rows
    assert code is not None
    return code.astype(jnp.uint8 if bits <= 8 else jnp.uint16)


def _fields(bits: int) -> list[int]:
    """Returns the widths whose sum a code's width is, the narrowest first."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    return [width for width in (1, 2, 4, 8) if bits & width]


def _pack_field(field: UInt32[Array, "*d S H"], width: int) -> UInt32[Array, "*d R H"]:
    planes = WORD_BITS // width
    *batch, num_tokens, head_dim = field.shape
    field = field.reshape(*batch, planes, num_tokens // planes, head_dim)
    # The planes don't overlap, so their sum is their union.
    return (field << _shifts(width)).sum(-3, dtype=jnp.uint32)


def _unpack_field(words: UInt32[Array, "*d R H"], width: int) -> UInt32[Array, "*d S H"]:
    *batch, rows, head_dim = words.shape
    field = (words[..., None, :, :] >> _shifts(width)) & jnp.uint32(2**width - 1)
    return field.reshape(*batch, WORD_BITS // width * rows, head_dim)


def _shifts(width: int) -> UInt32[Array, "planes 1 1"]:
    return jnp.arange(0, WORD_BITS, width, dtype=jnp.uint32)[:, None, None]
