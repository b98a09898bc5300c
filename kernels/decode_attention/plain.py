# SPDX-License-Identifier: Apache-2.0
"""The plain layout: a block is an array of the codes of its groups. Any codec, any machine."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvq_jax.base import KV, CacheSpec, Code, CodedSegment
from kvq_jax.codecs.base import Codec

BLOCK_SIZE = 1024
"""Most tokens of a block. Large enough to amortise a loop step, small enough for a CPU's L2."""


def init(
    spec: CacheSpec, key_codec: Codec, value_codec: Codec, group_size: int, num_tokens: int
) -> CodedSegment:
    """Returns an empty segment that can hold `num_tokens` tokens a row."""
    num_groups = math.ceil(num_tokens / group_size)
    most = max(1, BLOCK_SIZE // group_size)
    # The size of a block that rounds the number of groups up the least; large ones first.
    groups = min(range(most, most // 2, -1), key=lambda n: -num_groups % n)
    groups = min(groups, num_groups)
    blocks = math.ceil(num_groups / max(groups, 1))
    group = jax.ShapeDtypeStruct((group_size, spec.head_dim), spec.dtype)

    def empty(codec: Codec) -> Code:
        code = jax.eval_shape(codec.encode, group)
        lead = (spec.batch_size * blocks, spec.num_kv_heads, groups)
        return jax.tree.map(lambda x: jnp.zeros(lead + x.shape, x.dtype), code)

    table = jnp.arange(spec.batch_size * blocks, dtype=jnp.int32)
    return CodedSegment(
        keys=empty(key_codec),
        values=empty(value_codec),
        block_table=table.reshape(spec.batch_size, blocks),
        num_coded=jnp.zeros(spec.batch_size, jnp.int32),
    )


def block_size(coded: CodedSegment, group_size: int) -> int:
    """Returns the tokens of a block."""
    return jax.tree.leaves(coded.keys)[0].shape[2] * group_size


def write_group(
    coded: CodedSegment,
    keys: Code,
    values: Code,
    group_size: int,
    where: Bool[Array, " B"],
) -> CodedSegment:
    """Appends one group to the rows chosen by `where`.

    Args:
      coded: the segment. A row without room stays as it is.
      keys: code of the group's keys, leaves `[B, K, ...]`.
      values: code of its values, likewise.
      group_size: tokens of a group.
      where: rows to write.
    """
    num_blocks = coded.block_table.shape[1]
    size = block_size(coded, group_size)
    where &= coded.num_coded < num_blocks * size
    index = jnp.minimum(coded.num_coded // size, max(num_blocks - 1, 0))
    block = jnp.take_along_axis(coded.block_table, index[:, None], axis=1)[:, 0]
    group = coded.num_coded % size // group_size
    out_of_range = jax.tree.leaves(coded.keys)[0].shape[0]
    block = jnp.where(where, block, out_of_range)  # such a write is dropped

    def write(stored: Array, code: Array) -> Array:
        return stored.at[block, :, group].set(code, mode="drop")

    return coded._replace(
        keys=jax.tree.map(write, coded.keys, keys),
        values=jax.tree.map(write, coded.values, values),
        num_coded=coded.num_coded + jnp.where(where, group_size, 0).astype(jnp.int32),
    )


def read_blocks(
    coded: CodedSegment, blocks: Int[Array, "B n"], key_codec: Codec, value_codec: Codec, dtype: Any
) -> tuple[Array, Array, Array]:
    """Returns keys, values `B K n*block H` and hole mask `B K n*block` of some blocks of a row."""
    code_k, code_v = jax.tree.map(
        lambda x: jnp.moveaxis(x[blocks], 2, 1), (coded.keys, coded.values)
    )  # [B, K, n, groups, ...]
    keys, values = key_codec.decode(code_k, dtype), value_codec.decode(code_v, dtype)
    batch, heads, *_, head_dim = keys.shape
    shape = (batch, heads, -1, head_dim)
    mask = value_codec.mask(code_v).reshape(batch, heads, -1)
    return keys.reshape(shape), values.reshape(shape), mask


def read(coded: CodedSegment, key_codec: Codec, value_codec: Codec, dtype: Any) -> KV:
    """Returns the whole segment dense."""
    keys, values, mask = read_blocks(coded, coded.block_table, key_codec, value_codec, dtype)
    positions = jnp.where(mask, jnp.arange(keys.shape[2], dtype=jnp.int32), -1)
    return KV(keys, values, positions)
