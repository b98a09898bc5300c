# SPDX-License-Identifier: Apache-2.0
"""Static sizes of a launch."""

import dataclasses
import math

from kvq_jax.kernels.decode_attention import tpu

SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """Codes of keys or values.

    Attributes:
      bits: of a field.
      groups: that have scales of their own: of a tile's tokens for keys, of channels for values.
      spliced: whether fields of 2 bits become float8_e5m2, rather than int8 and bfloat16.
    """

    bits: int
    groups: int
    spliced: bool

    @property
    def words(self) -> int:
        """Rows of words of 128 x 128 fields."""
        return tpu.word_rows(self.bits)

    def affine(self, scale, minimum):
        """Returns scale and minimum of operands, given those of fields; see `operands.operand`."""
        if self.bits == 8:
            return scale, minimum + scale * 128.0
        if self.bits == 2 and not self.spliced:
            return scale, minimum
        scale = scale * 2.0**self.bits
        return scale, minimum - scale


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static sizes of a launch.

    Attributes:
      num_tokens: T.
      num_queries: query heads of a KV head.
      head_dim: H.
      heads: KV heads of a step.
      dense_slots: S.
      dense_block: slots of a step.
      tiles: of a block of codes; 0 without codes.
      tiles_at_once: of these.
      keys: codes of keys.
      values: codes of values.
      sliding_window: latest tokens that a query sees, or None.
    """

    num_tokens: int
    num_queries: int
    head_dim: int
    heads: int
    dense_slots: int
    dense_block: int
    tiles: int
    tiles_at_once: int
    keys: Part
    values: Part
    sliding_window: int | None

    @property
    def dense_steps(self) -> int:
        """Steps that read dense slots. The last of them reads the first block of codes, too."""
        return -(-self.dense_slots // self.dense_block)

    @property
    def halves(self) -> int:
        """See `tpu.num_halves`."""
        return tpu.num_halves(self.head_dim)

    @property
    def chunks(self) -> int:
        """See `tpu.num_chunks`."""
        return tpu.num_chunks(self.head_dim)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return tpu.tile_tokens(self.head_dim)

    @property
    def queries(self) -> int:
        """Rows of the queries of a KV head: T times query heads, rounded up."""
        count = self.num_tokens * self.num_queries
        if count > SUBLANES:
            return -(-count // SUBLANES) * SUBLANES
        return 1 << (count - 1).bit_length()

    @property
    def together(self) -> int:
        """Tiles that share the rows of a register."""
        room = max(1, SUBLANES // (self.halves * self.queries))
        return math.gcd(self.tiles_at_once, room)

    @property
    def rows(self) -> int:
        """Of all that is computed with: (tile, half, query)."""
        return self.together * self.halves * self.queries
