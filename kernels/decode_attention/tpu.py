# SPDX-License-Identifier: Apache-2.0
"""The tpu layout: codes lie as the matrix unit of a TPU takes its stationary operand.

A tile is what is multiplied at a time: 128 tokens; 256 of heads of 64 channels, whose second half
of tokens then fills the rows or lanes that channels leave free:

    keys    rows are channels, lanes are tokens: 128 x 128, of 256 channels two of these
    values  rows are tokens, lanes are channels: 128 x 128, of 256 channels two of these

So neither scores nor weights are ever moved between lanes. Down the 128 rows codes are packed into
words of 32 bits: a shift and two masks of the words give a register of operands of 8 bits (or of
16, for codes of 4 bits), in order. Row p lies in

    row p % (R E) // E of R, there in operand p % E of E, and in it in field p // (R E),

with E operands in a word and R rows of words.

A pair of scale and minimum (float16, the scale below) is a word as well. Those of keys are a row of
channels for each group of a tile's tokens, those of values a row of tokens for each group of
channels and each half. A block is one array, and comes in one copy: the words of all tiles, then
their scales, all of the first group, then of the second.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Int32, UInt

from kvq_jax import packing
from kvq_jax.base import CacheSpec, CodedSegment
from kvq_jax.codecs.affine import Affine, AffineCode
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention import layouts

LANES = 128
SLOTS = 16
"""Dense slots of which a state has a multiple: registers of bfloat16 have so many rows. XLA would
lay out another number of them differently, and copy them for the kernel."""
BLOCK_SIZE = 4096
"""Most tokens of a block: what a step of the kernel reads, of some heads. A step costs as much as
some 500 tokens do besides, and reads a whole block even if only few tokens are in it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TpuCode:
    """Blocks of codes of keys or values, in the order of the layout.

    Attributes:
      words: fields and scales, int32 `[*d, R, 128]`.
      head_dim: H.
      num_tiles: of a block.
    """

    words: Any  # while JAX takes a pytree apart, it may be anything
    head_dim: int = dataclasses.field(metadata={"static": True})
    num_tiles: int = dataclasses.field(metadata={"static": True})


def available() -> bool:
    """Returns whether JAX computes, or compiles, for a TPU."""
    try:
        pltpu.get_tpu_info()
    except ValueError:  # says that it is none
        return False
    return True


def num_halves(head_dim: int) -> int:
    """Returns how many groups of 128 tokens of a tile lie beside each other."""
    return max(1, LANES // head_dim)


def num_chunks(head_dim: int) -> int:
    """Returns how many groups of 128 channels of a tile lie beneath each other."""
    return max(1, head_dim // LANES)


def tile_tokens(head_dim: int) -> int:
    """Returns the tokens of a tile."""
    return LANES * num_halves(head_dim)


def word_rows(bits: int) -> int:
    """Returns the rows of words that 128 rows of codes are packed into."""
    return LANES * bits // packing.WORD_BITS


def block_sizes(num_tokens: int, head_dim: int) -> list[int]:
    """Returns the tiles that blocks may have, for rows of so many tokens."""
    size = max(BLOCK_SIZE // 4, min(BLOCK_SIZE, num_tokens / 8))
    most = math.ceil(size / tile_tokens(head_dim))
    # Two tiles of few queries go together; beyond what the kernel computes at once, its parts must
    # begin at whole registers.
    pairs = 2 if head_dim >= LANES else 1
    return [n for n in range(most, most // 2, -1) if n % (8 if n > 16 else pairs) == 0] or [most]


def operand_bits(bits: int) -> int:
    """Returns the bits of an operand that codes of so many bits are masked into."""
    return 16 if bits == 4 else 8


def reason_against(
    spec: CacheSpec, key_codec: Codec, value_codec: Codec, group_size: int
) -> str | None:
    """Returns why the layout can't hold these codes, or None if it can."""
    return layouts.reason_against(spec, key_codec, value_codec, group_size)


def suits(spec: CacheSpec, key_codec: Codec, value_codec: Codec, group_size: int) -> bool:
    """Returns whether a TPU's cache is to have this layout: others are read faster from plain."""
    reason = reason_against(spec, key_codec, value_codec, group_size)
    return spec.dtype == jnp.bfloat16 and not reason


def from_codes(keys: AffineCode, values: AffineCode) -> tuple[TpuCode, TpuCode]:
    """Returns codes of the groups of blocks, `[*d, n, ...]`, in the order of the layout."""

    def block(words: Array, scales: Array) -> TpuCode:
        *batch, num_tiles, _, _ = words.shape
        rows = [x.reshape(*batch, -1, LANES) for x in (words, scales)]
        return TpuCode(jnp.concatenate(rows, -2), keys.words.shape[-1], num_tiles)

    return block(*_keys(*_integers(keys), values.scale.shape[-2])), block(
        *_values(*_integers(values))
    )


def to_codes(
    keys: TpuCode, values: TpuCode, key_codec: Affine, value_codec: Affine
) -> tuple[AffineCode, AffineCode]:
    """Undoes `from_codes`."""
    head_dim, num_tiles, group_size = keys.head_dim, keys.num_tiles, key_codec.tile[0]
    halves, chunks = num_halves(head_dim), num_chunks(head_dim)
    batch = keys.words.shape[:-2]
    groups = (*batch, num_tiles * tile_tokens(head_dim) // group_size)

    def split(code: TpuCode, bits: int) -> tuple[Array, Array]:
        count = num_tiles * chunks * word_rows(bits)
        words, scales = code.words[..., :count, :], code.words[..., count:, :]
        return _unpack(words.reshape(*batch, num_tiles, chunks, -1, LANES), bits), scales

    def code(fields: Array, pairs: Array, codec: Affine) -> AffineCode:
        words = packing.pack(fields.reshape(*groups, group_size, head_dim), codec.bits)
        scale, minimum = (
            jax.lax.bitcast_convert_type((pairs >> shift).astype(jnp.uint16), jnp.float16)
            for shift in (0, 16)
        )
        return AffineCode(words, scale, minimum)

    # As `_keys` and `_values` have it, backwards.
    fields, pairs = split(keys, key_codec.bits)
    fields = fields.reshape(*batch, num_tiles, halves, head_dim, LANES).swapaxes(-1, -2)
    pairs = pairs.reshape(*batch, -1, chunks, num_tiles, halves, head_dim // chunks)
    pairs = jnp.moveaxis(pairs, (-5, -4), (-3, -2)).reshape(*groups, 1, head_dim)
    key_code = code(fields, pairs, key_codec)
    fields, pairs = split(values, value_codec.bits)
    fields = fields.reshape(*batch, num_tiles, chunks, LANES, halves, head_dim // chunks)
    fields = jnp.moveaxis(fields, (-2, -3, -4), (-4, -3, -2))
    pairs = pairs.reshape(*batch, -1, num_tiles * halves, LANES)
    pairs = jnp.moveaxis(pairs, -3, -1).reshape(*groups, group_size, -1)
    return key_code, code(fields, pairs, value_codec)


def write_groups(
    coded: CodedSegment, keys: AffineCode, values: AffineCode, num_groups: Int[Array, " B"]
) -> CodedSegment:
    """Appends groups to each row; see `plain.write_groups`.

    Whole tiles are written. Of one that has tokens already, these are merged into its words.

    Args:
      coded: the segment.
      keys: code of the groups' keys, leaves `[B, K, n, ...]`.
      values: code of their values, likewise.
      num_groups: groups to write, 0 to n; there must be room for them.
    """
    group_size, n = values.scale.shape[-2], keys.words.shape[2]
    per_tile = tile_tokens(coded.keys.head_dim) // group_size
    num_tiles = math.ceil((n + per_tile - 1) / per_tile)
    first_tile, before = jnp.divmod(coded.num_coded // group_size, per_tile)
    group = jnp.arange(num_tiles * per_tile, dtype=jnp.int32) - before[:, None]
    present = (group >= 0) & (group < num_groups[:, None])
    tile = first_tile[:, None] + jnp.arange(num_tiles, dtype=jnp.int32)
    block, tile = jnp.divmod(tile, coded.keys.num_tiles)
    block = jnp.take_along_axis(coded.block_table, block, axis=1, mode="clip")
    written = present.reshape(*tile.shape, per_tile).any(-1)
    block = jnp.where(written, block, coded.keys.words.shape[0])  # out of range: is dropped

    def place(leaf: Array) -> Array:
        """Moves the groups to where they are in the tiles."""
        index = group.reshape(-1, 1, group.shape[1], *(1,) * (leaf.ndim - 3))
        return leaf if per_tile == 1 else jnp.take_along_axis(leaf, index, 2, mode="clip")

    def ones(leaf: Array) -> Array:
        """Returns all bits that belong to groups that are written."""
        here = present.reshape(-1, 1, group.shape[1], *(1,) * (leaf.ndim - 3))
        none = jnp.zeros((), leaf.dtype)
        bits = jnp.where(here, ~none, none)
        return jnp.broadcast_to(bits, (*bits.shape[:3], *leaf.shape[3:]))

    def write(stored: TpuCode, new: tuple[Array, Array], mask: tuple[Array, Array]) -> TpuCode:
        (words, scales), rows = new, stored.words
        groups, _, halves, _ = scales.shape[2:]
        row = tile[..., None] * words.shape[3] + jnp.arange(words.shape[3], dtype=jnp.int32)
        rows = put(rows, row[:, None], words, mask[0])
        group = jnp.arange(groups, dtype=jnp.int32)[:, None, None] * stored.num_tiles
        half = jnp.arange(halves, dtype=jnp.int32)
        row = (group + tile[:, None, :, None]) * halves + half
        row += stored.num_tiles * words.shape[3]
        rows = put(rows, row[:, None], scales, mask[1])
        return dataclasses.replace(stored, words=rows)

    def put(rows: Array, row: Array, new: Array, mask: Array) -> Array:
        # All indexed axes lead, the heads' too: where they don't, XLA may transpose the segment.
        head = jnp.arange(rows.shape[1], dtype=jnp.int32)
        head = head.reshape(-1, *(1,) * (row.ndim - 2))
        which = block.reshape(-1, *(1,) * (row.ndim - 3), num_tiles, 1)
        if per_tile > 1:
            new = (rows.at[which, head, row].get(mode="clip") & ~mask) | new & mask
        return rows.at[which, head, row].set(new, mode="drop")

    def arrange(change):
        of_keys, of_values = jax.tree.map(change, (_integers(keys), _integers(values)))
        return _keys(*of_keys, group_size=group_size), _values(*of_values)

    new, masks = arrange(place), arrange(ones)
    return coded._replace(
        keys=write(coded.keys, new[0], masks[0]),
        values=write(coded.values, new[1], masks[1]),
        num_coded=coded.num_coded + num_groups * group_size,
    )


def _integers(code: AffineCode) -> tuple[Array, Array, Array]:
    """Returns words, scale and minimum as bits."""
    scale, minimum = (
        jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (code.scale, code.minimum)
    )
    return code.words, scale, minimum


def _keys(words: Array, scale: Array, minimum: Array, group_size: int) -> tuple[Array, Array]:
    """Returns words `[*d, tiles, R, 128]` and scales `[*d, groups, tiles, 1, 128]` of keys."""
    *batch, num_groups, rows, head_dim = words.shape
    halves, chunks = num_halves(head_dim), num_chunks(head_dim)
    bits = packing.WORD_BITS * rows // group_size
    num_tiles = num_groups * group_size // tile_tokens(head_dim)
    fields = packing.unpack(words, bits).reshape(*batch, num_tiles, halves, LANES, head_dim)
    fields = fields.swapaxes(-1, -2).reshape(*batch, num_tiles, chunks, LANES, LANES)
    pairs = _pair(scale, minimum)
    pairs = pairs.reshape(*batch, num_tiles, halves, -1, chunks, head_dim // chunks)
    pairs = jnp.moveaxis(pairs, (-3, -2), (-5, -4))  # groups, chunks, tiles, halves, channels
    return _pack(fields, bits), pairs.reshape(*batch, -1, num_tiles, 1, LANES)


def _values(words: Array, scale: Array, minimum: Array) -> tuple[Array, Array]:
    """Returns words `[*d, tiles, R, 128]` and scales `[*d, groups, tiles, halves, 128]`."""
    *batch, num_groups, rows, head_dim = words.shape
    group_size, channel_groups = scale.shape[-2:]
    halves, chunks = num_halves(head_dim), num_chunks(head_dim)
    bits = packing.WORD_BITS * rows // group_size
    num_tiles = num_groups * group_size // tile_tokens(head_dim)
    fields = packing.unpack(words, bits)
    fields = fields.reshape(*batch, num_tiles, halves, LANES, chunks, head_dim // chunks)
    fields = jnp.moveaxis(fields, (-4, -3, -2), (-2, -3, -4))  # chunks, tokens, halves, channels
    fields = fields.reshape(*batch, num_tiles, chunks, LANES, LANES)
    pairs = _pair(scale, minimum).reshape(*batch, num_tiles, halves, LANES, channel_groups)
    return _pack(fields, bits), jnp.moveaxis(pairs, -1, -4)


def _pair(low: UInt[Array, "*d"], high: UInt[Array, "*d"]) -> Int32[Array, "*d"]:
    pair = low.astype(jnp.uint32) | high.astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(pair, jnp.int32)


def _order(bits: int) -> tuple[int, int, int]:
    """Returns fields of an operand, rows of words and operands of a word: how 128 rows are cut."""
    operands = packing.WORD_BITS // operand_bits(bits)
    return operand_bits(bits) // bits, word_rows(bits), operands


def _pack(fields: Array, bits: int) -> Int32[Array, "*d R 128"]:
    """Packs chunks of 128 rows, `[*d, chunks, 128, 128]`."""
    *batch, chunks, _, _ = fields.shape
    fields = fields.reshape(*batch, chunks, *_order(bits), LANES)
    fields = jnp.moveaxis(fields, -2, -4).reshape(*batch, chunks, LANES, LANES)
    words = packing.pack(fields, bits).reshape(*batch, -1, LANES)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _unpack(words: Int32[Array, "*d chunks R 128"], bits: int) -> Array:
    """Undoes `_pack`."""
    fields, rows, operands = _order(bits)
    *batch, _, _ = words.shape
    codes = packing.unpack(jax.lax.bitcast_convert_type(words, jnp.uint32), bits)
    codes = codes.reshape(*batch, operands, fields, rows, LANES)
    return jnp.moveaxis(codes, -4, -2).reshape(*batch, LANES, LANES)
