# SPDX-License-Identifier: Apache-2.0
"""The hopper layout: codes lie in the order in which tensor cores of a GPU take operands.

A tile is 16 tokens by 16 channels, the left operand of `mma.m16n8k16`: of keys with tokens as rows,
of values with channels as rows. Lane l of a warp, with g = l // 4 and t = l % 4, holds in its word
i of four, and there in half e of two, the element at

    row g + 8 (i % 2), column 2 t + e + 8 (i // 2).

Rows and columns that are tokens follow each other. Those that are channels are shared out so that
a lane's channels in two neighbouring tiles are 8 in a row, and dense keys and values can be loaded
16 bytes at a time and meet the same queries:

    tile x of keys    channel 32 (x // 2) + 8 t + 4 (x % 2) + 2 (i // 2) + e
    tile x of values  channel 32 (x // 2) + 8 (g // 2) + 4 (x % 2) + 2 (i % 2) + g % 2

A half has 16 / bits fields: the same element of that many tiles, which follow each other along the
channels, and along the tokens where a head has fewer channels than that. So one mask makes an
operand of a word, and the four words of a lane are one load of 16 bytes.

A group of tokens is contiguous, and is written whole: its fields, then scales and minima, float16
in pairs. Those of keys are two rows of channels; those of values go token by token, a pair (scale,
minimum) for each group of channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float16, UInt32

from kvq_jax import packing
from kvq_jax.base import CacheSpec
from kvq_jax.codecs.affine import Affine, AffineCode
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention import layouts

TILE = 16
UNIT = 128
"""Tokens of which a block holds a multiple: the most that a warp copies at a time."""


class TileCode(NamedTuple):
    """Codes of groups of keys or values, in the order of the layout."""

    words: UInt32[Array, "*d W"]


def available() -> bool:
    """Returns whether JAX computes on a Hopper GPU."""
    if jax.default_backend() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", "").startswith("9.")


def reason_against(
    spec: CacheSpec, key_codec: Codec, value_codec: Codec, group_size: int
) -> str | None:
    """Returns why the layout can't hold these codes, or None if it can."""
    return layouts.reason_against(spec, key_codec, value_codec, group_size, 2 * TILE)


def from_codes(keys: AffineCode, values: AffineCode) -> tuple[TileCode, TileCode]:
    """Returns codes of groups, their leaves `[..., ...]`, in the order of the layout."""
    *batch, num_tokens, _ = values.scale.shape
    key_scales = jnp.stack([keys.scale, keys.minimum], -3)
    value_scales = jnp.stack([values.scale, values.minimum], -1)

    def group(code: AffineCode, scales: Array, values: bool) -> TileCode:
        fields = _tile(code.words, num_tokens, values)
        return TileCode(jnp.concatenate([fields, _words(scales.reshape(*batch, -1))], -1))

    return group(keys, key_scales, values=False), group(values, value_scales, values=True)


def to_codes(
    keys: TileCode, values: TileCode, key_codec: Affine, value_codec: Affine
) -> tuple[AffineCode, AffineCode]:
    """Undoes `from_codes`."""
    *batch, num_words = keys.words.shape
    num_tokens = key_codec.tile[0]
    head_dim = num_words * packing.WORD_BITS // (num_tokens * key_codec.bits + packing.WORD_BITS)
    words, scales = [], []
    for code, codec, of_values in ((keys, key_codec, False), (values, value_codec, True)):
        count = num_tokens * head_dim * codec.bits // packing.WORD_BITS
        fields = code.words[..., :count]
        words.append(_untile(fields, codec.bits, num_tokens, head_dim, values=of_values))
        scales.append(jax.lax.bitcast_convert_type(code.words[..., count:], jnp.float16))
    rows = scales[0].reshape(*batch, 2, 1, head_dim)
    pairs = scales[1].reshape(*batch, num_tokens, -1, 2)
    return (
        AffineCode(words[0], rows[..., 0, :, :], rows[..., 1, :, :]),
        AffineCode(words[1], pairs[..., 0], pairs[..., 1]),
    )


def _words(halves: Float16[Array, "*d n"]) -> UInt32[Array, "*d m"]:
    pairs = halves.reshape(*halves.shape[:-1], -1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint32)


def _tile(words: UInt32[Array, "*d R H"], num_tokens: int, values: bool) -> UInt32[Array, "*d W"]:
    *batch, rows, head_dim = words.shape
    bits = packing.WORD_BITS * rows // num_tokens
    shape, order = _axes(bits, num_tokens, head_dim, values)
    fields = packing.unpack(words, bits).reshape(*batch, *shape)
    fields = fields.transpose(*range(len(batch)), *(len(batch) + i for i in order))
    return packing.pack(fields.reshape(*batch, -1, 1), bits)[..., 0]


def _untile(
    words: UInt32[Array, "*d W"], bits: int, num_tokens: int, head_dim: int, values: bool
) -> UInt32[Array, "*d R H"]:
    *batch, _ = words.shape
    shape, order = _axes(bits, num_tokens, head_dim, values)
    fields = packing.unpack(words[..., None], bits).reshape(*batch, *(shape[i] for i in order))
    back = sorted(range(len(order)), key=order.__getitem__)
    fields = fields.transpose(*range(len(batch)), *(len(batch) + i for i in back))
    return packing.pack(fields.reshape(*batch, num_tokens, head_dim), bits)


def _axes(
    bits: int, num_tokens: int, head_dim: int, values: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns how tokens and channels are cut, and the order that makes words of the pieces.

    The first four axes in that order are the fields of a word, lowest first.
    """
    fields = 16 // bits
    across = min(fields, head_dim // TILE)  # tiles along the channels that share words
    along = fields // across  # and along the tokens
    tokens = num_tokens // (TILE * along), along
    channels = head_dim // (TILE * across), across // 2
    if values:
        #        0, 1     i // 2  t  e  5, 6       g // 2  x % 2  i % 2  g % 2
        shape = *tokens, 2, 4, 2, *channels, 4, 2, 2, 2
        return shape, (4, 1, 6, 8, 0, 5, 7, 10, 3, 2, 9)
    #        0, 1     i % 2  g  4, 5       t  x % 2  i // 2  e
    shape = *tokens, 2, 8, *channels, 4, 2, 2, 2
    return shape, (9, 1, 5, 7, 0, 4, 3, 6, 8, 2)
