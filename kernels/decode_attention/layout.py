# SPDX-License-Identifier: Apache-2.0
"""What a layout of codes in memory is: one object for each machine, all with these functions."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvq_jax.base import Attention, Code
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention.segments import Coding

Blocks = Any
"""A pytree of codes of keys and values; leaves `[num_blocks, K, ...]`; all zero when empty."""


class Layout(Protocol):
    """Makes, writes and reads blocks of codes. Instances are hashable and compare by value.

    A *hole* is a slot that was not written yet, or whose token is kept elsewhere. Codecs know
    nothing of holes: the layout remembers them, such as by a scale of zero, which no code has.
    """

    @property
    def name(self) -> str:
        """A short name for arguments and messages."""
        ...

    def reason_against(
        self,
        attention: Attention,
        key_codec: Codec,
        value_codec: Codec,
        group_size: int,
        dtype: jnp.dtype,
    ) -> str | None:
        """Returns why the layout can't hold these codes, or None if it can.

        Args:
          attention: of the layer.
          key_codec: of a group's keys.
          value_codec: of a group's values.
          group_size: tokens coded at a time.
          dtype: of the keys and values.
        """
        ...

    def block_size(self, attention: Attention, group_size: int, num_tokens: int) -> int:
        """Returns the tokens of a block for rows of up to `num_tokens` coded tokens."""
        ...

    def init(
        self, attention: Attention, coding: Coding, num_blocks: int, dtype: jnp.dtype
    ) -> Blocks:
        """Returns empty blocks."""
        ...

    def write(
        self,
        coding: Coding,
        blocks: Blocks,
        codes: tuple[Code, Code],
        present: Bool[Array, "B K n S"] | None,
        block_table: Int[Array, "B M"],
        num_coded: Int[Array, " B"],
        num_groups: Int[Array, " B"],
    ) -> Blocks:
        """Writes groups behind the tokens that each row has coded already.

        Args:
          coding: of the blocks.
          blocks: to be written to.
          codes: of the keys and the values of n groups, leaves `[B, K, n, ...]`.
          present: False for tokens that are to be holes; None for no holes.
          block_table: the blocks of each row.
          num_coded: tokens of each row coded so far.
          num_groups: groups to write, 0 to n. What a row has no block for is left out.
        """
        ...

    def read(
        self, coding: Coding, blocks: Blocks, which: Int[Array, "B n"], dtype: jnp.dtype
    ) -> tuple[Array, Array, Bool[Array, "B K S"]]:
        """Returns keys and values `B K S H` of some blocks of each row, and where tokens are.

        Args:
          coding: of the blocks.
          blocks: to be read.
          which: n blocks of each row; S = n * block_size.
          dtype: of the result.
        """
        ...
