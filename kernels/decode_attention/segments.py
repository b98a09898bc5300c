# SPDX-License-Identifier: Apache-2.0
"""Where attention finds tokens: dense slots, a ring, and blocks of codes."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention import rules

if TYPE_CHECKING:
    from kvq_jax.kernels.decode_attention.layout import Layout


class Ring(NamedTuple):
    """Dense keys and values of a pool, and of a ring that follows it.

    The W slots of the ring hold the latest tokens: the one at position p lies in slot p mod W,
    until the one at p + W takes its place. A kernel derives these positions and reads none.

    A row whose ring has overwritten a token that `start` does not account for
    (`rules.lacks_room`) attends to NaN.

    Attributes:
      keys: S = P + W slots.
      values: likewise.
      pool: positions of the tokens in the pool, -1 where there is none; P may be 0.
      start: tokens before this position are elsewhere, such as in codes.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S Hv"]
    pool: Int[Array, "B K P"]
    start: Int[Array, " B"]

    @property
    def window(self) -> int:
        """W, slots of the ring."""
        return self.keys.shape[2] - self.pool.shape[2]

    def located(self, length: Int[Array, " B"]) -> KV:
        """Returns the same with the position of each slot, for rows of this length."""
        batch, num_heads = self.keys.shape[:2]
        slot = jnp.arange(self.window, dtype=jnp.int32)
        positions = rules.ring_position(slot, length[:, None], self.window)
        positions = jnp.where(positions >= self.start[:, None], positions, -1)[:, None]
        if self.pool.shape[2]:
            positions = jnp.broadcast_to(positions, (batch, num_heads, self.window))
            positions = jnp.concatenate([self.pool, positions], -1)
        return KV(self.keys, self.values, positions)


class Coded(NamedTuple):
    """The compressed past: codes of whole groups of tokens, in blocks.

    The token at position p of row b lies in block `block_table[b, p // block_size]`, or, where
    `start` is given, in the block m with `start[b, m] <= p < start[b, m] + block_size`.

    Attributes:
      blocks: what a `Layout` has made; leaves `[num_blocks, K, ...]`.
      block_table: the blocks of each row, in order.
      num_coded: tokens coded so far; a multiple of the group size. Positions from here on are
        in no block.
      start: position of the first token of each block; None where they follow each other from 0.
    """

    blocks: Any
    block_table: Int[Array, "B M"]
    num_coded: Int[Array, " B"]
    start: Int[Array, "B M"] | None = None


@dataclasses.dataclass(frozen=True)
class Coding:
    """How a coded segment is coded and laid out.

    Args:
      key_codec: of a group's keys, bound to its parameters.
      value_codec: of a group's values, likewise.
      group_size: tokens coded at a time.
      block_size: tokens of a block, a multiple of the group size.
      layout: of the codes in memory.
    """

    key_codec: Codec
    value_codec: Codec
    group_size: int
    block_size: int
    layout: "Layout"
