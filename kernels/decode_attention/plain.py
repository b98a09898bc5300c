# SPDX-License-Identifier: Apache-2.0
"""Blocks of codes: how a coded segment is made, written and read.

A block is an array of the codes of its groups. In the plain layout, which takes any codec and runs
on any machine, these are what the codec made of them; in the hopper layout (`hopper`) a group is
ordered as the tensor cores of a GPU take it, in the tpu layout (`tpu`) all groups of a block are as
the matrix unit of a TPU does.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CacheSpec, Code, CodedSegment
from kvq_jax.codecs.affine import Affine
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention import hopper, tpu
from kvq_jax.rope import turn

Layout = Literal["plain", "hopper", "tpu"]

BLOCK_SIZE = 1024
"""Most tokens of a block. Large enough to amortise a loop step, small enough for a CPU's L2."""


def init(
    spec: CacheSpec,
    key_codec: Codec,
    value_codec: Codec,
    group_size: int,
    num_tokens: int,
    layout: Layout | None = None,
) -> CodedSegment:
    """Returns an empty segment.

    Args:
      spec: of the cache.
      key_codec: of a group's keys.
      value_codec: of its values.
      group_size: tokens of a group.
      num_tokens: tokens that a row can hold at the least.
      layout: None takes the best that can hold these codes on this machine.
    """
    given = spec, key_codec, value_codec, group_size
    reasons = {"hopper": hopper.reason_against(*given), "tpu": tpu.reason_against(*given)}
    if layout is None:
        # What the kernels do not compute in is read faster from plain codes.
        layout = "plain"
        if hopper.available() and spec.dtype.itemsize == 2 and not reasons["hopper"]:
            layout = "hopper"
        if tpu.available() and tpu.suits(*given):
            layout = "tpu"
    if reason := reasons.get(layout):
        raise ValueError(f"the {layout} layout can't hold these codes: {reason}")
    # Groups come in whole units, these in blocks of the size that rounds their number up the least,
    # large ones first.
    if layout == "tpu":
        unit = tpu.tile_tokens(spec.head_dim)
        sizes = tpu.block_sizes(num_tokens, spec.head_dim)
    else:
        unit = hopper.UNIT if layout == "hopper" else group_size
        most = max(1, BLOCK_SIZE // unit)
        sizes = range(most, most // 2, -1)
    unit = max(1, unit // group_size)
    num_units = math.ceil(num_tokens / group_size / unit)
    units = max(1, min(min(sizes, key=lambda n: -num_units % n), num_units))
    blocks = math.ceil(num_units / units)

    def codes(block: Array) -> tuple[Code, Code]:
        codes = key_codec.encode(block), value_codec.encode(block)
        if layout == "hopper":
            return hopper.from_codes(*codes)
        return tpu.from_codes(*codes) if layout == "tpu" else codes

    shape = (spec.batch_size, spec.num_kv_heads, units * unit, group_size, spec.head_dim)
    block = jax.ShapeDtypeStruct(shape, spec.dtype)  # of each row: codecs may be fitted to them
    keys, values = jax.tree.map(
        lambda x: jnp.zeros((spec.batch_size * blocks, *x.shape[1:]), x.dtype),
        jax.eval_shape(codes, block),
    )
    table = jnp.arange(spec.batch_size * blocks, dtype=jnp.int32)
    return CodedSegment(
        keys=keys,
        values=values,
        block_table=table.reshape(spec.batch_size, blocks),
        num_coded=jnp.zeros(spec.batch_size, jnp.int32),
    )


def block_size(coded: CodedSegment, group_size: int) -> int:
    """Returns the tokens of a block."""
    if isinstance(coded.keys, tpu.TpuCode):
        return coded.keys.num_tiles * tpu.tile_tokens(coded.keys.head_dim)
    return jax.tree.leaves(coded.keys)[0].shape[2] * group_size


def write_groups(
    coded: CodedSegment,
    keys: Code,
    values: Code,
    group_size: int,
    num_groups: Int[Array, " B"],
) -> CodedSegment:
    """Appends the first `num_groups` of n groups to each row.

    Args:
      coded: the segment. What a row has no room for is left out.
      keys: code of the groups' keys, leaves `[B, K, n, ...]`.
      values: code of their values, likewise.
      group_size: tokens of a group.
      num_groups: groups to write, 0 to n.
    """
    num_heads, n = jax.tree.leaves(keys)[0].shape[1:3]
    num_blocks = coded.block_table.shape[1]
    per_block = max(1, block_size(coded, group_size) // group_size)
    first = coded.num_coded // group_size
    num_groups = jnp.minimum(num_groups, num_blocks * per_block - first)
    if isinstance(coded.keys, tpu.TpuCode):
        return tpu.write_groups(coded, keys, values, num_groups)
    if isinstance(coded.keys, hopper.TileCode):
        keys, values = hopper.from_codes(keys, values)
    offset = jnp.arange(n, dtype=jnp.int32)
    block, group = jnp.divmod(first[:, None] + offset, per_block)
    block = jnp.take_along_axis(coded.block_table, block, axis=1, mode="clip")
    out_of_range = jax.tree.leaves(coded.keys)[0].shape[0]
    block = jnp.where(offset < num_groups[:, None], block, out_of_range)  # is dropped
    # With an index for the heads too, the indexed axes are the leading ones: where they are not,
    # XLA may transpose the whole segment for a GPU's scatter, and back.
    head = jnp.arange(num_heads, dtype=jnp.int32)[:, None]
    at = block[:, None], head, group[:, None]  # [B, K, n]

    def write(stored: Array, code: Array) -> Array:
        return stored.at[at].set(code, mode="drop")

    return coded._replace(
        keys=jax.tree.map(write, coded.keys, keys),
        values=jax.tree.map(write, coded.values, values),
        num_coded=coded.num_coded + num_groups * group_size,
    )


def read_blocks(
    coded: CodedSegment, blocks: Int[Array, "B n"], key_codec: Codec, value_codec: Codec, dtype: Any
) -> tuple[Array, Array, Array]:
    """Returns keys, values `B K n*block H` and hole mask `B K n*block` of some blocks of a row."""
    code_k, code_v = jax.tree.map(
        lambda x: jnp.moveaxis(x[blocks], 2, 1), (coded.keys, coded.values)
    )  # [B, K, n, groups, ...]
    if isinstance(key_codec, Affine) and isinstance(value_codec, Affine):
        if isinstance(code_k, hopper.TileCode):
            code_k, code_v = hopper.to_codes(code_k, code_v, key_codec, value_codec)
        elif isinstance(code_k, tpu.TpuCode):
            code_k, code_v = tpu.to_codes(code_k, code_v, key_codec, value_codec)
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


def turned(kv: KV, rope: Float[Array, "B half"] | None) -> KV:
    """Returns keys from before rotary embedding as they are after it; None changes nothing."""
    if rope is None:
        return kv
    angle = kv.positions[..., None].astype(jnp.float32) * rope[:, None, None]
    # Without the barrier XLA computes them anew for every head and channel that they turn.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    return kv._replace(keys=turn(kv.keys, cos, sin))
