# SPDX-License-Identifier: Apache-2.0
"""The kernel as a function of arrays: one launch through Pallas."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CodedSegment, RingKV
from kvq_jax.codecs.affine import Affine
from kvq_jax.kernels.decode_attention import layouts, tpu
from kvq_jax.kernels.decode_attention.mosaic_tpu import program
from kvq_jax.kernels.decode_attention.mosaic_tpu.problem import SUBLANES, Part, Problem

DENSE_BLOCK = 1024
STEP_BYTES = 5 * 2**20
"""That a step reads at the most, if not of a single head: twice as much has room beside the rest in
the memory of every chip."""
TILES_AT_ONCE = 128
"""Tiles of all heads of a step that are computed together: the program is as long."""


def reason_against(q: Float[Array, "B T N H"], coded: CodedSegment | None) -> str | None:
    """Returns why the kernel can't serve a call, or None if it can."""
    if reason := layouts.reason_against_call(
        q, coded, dtypes=["bfloat16"], layout="tpu", code=tpu.TpuCode
    ):
        return reason
    if coded is None and q.shape[3] < tpu.LANES:
        return f"heads of {q.shape[3]} channels without codes would be copied to where it reads"
    return None


def decode_attention(
    q: Float[Array, "B T N H"],
    length: Int[Array, " B"],
    dense: KV | RingKV,
    coded: CodedSegment | None,
    key_codec: Affine | None,
    value_codec: Affine | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
    capacity: int | None = None,
) -> Float[Array, "B T N H"]:
    """Returns attention over both segments; see `api.decode_attention`.

    Args:
      q: queries.
      length: tokens of each row.
      dense: tokens kept as they are.
      coded: tokens kept as codes, in the tpu layout.
      key_codec: of `coded.keys`.
      value_codec: of `coded.values`.
      sm_scale: factor of the scores.
      sliding_window: latest tokens that a query sees, or None.
      capacity: tokens that a row can hold, or None.
    """
    problem, scalars, arrays = prepare(
        q,
        length,
        dense,
        coded,
        key_codec,
        value_codec,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
    )
    out = launch(problem, scalars, arrays)
    batch, num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = num_q_heads // problem.num_queries
    out = out[:, :, : num_tokens * problem.num_queries]
    out = out.reshape(batch, num_kv_heads, num_tokens, problem.num_queries, head_dim)
    out = out.swapaxes(1, 2).reshape(q.shape)
    if capacity is None:
        return out
    return jnp.where((length > capacity)[:, None, None, None], jnp.nan, out)


def prepare(
    q: Float[Array, "B T N H"],
    length: Int[Array, " B"],
    dense: KV | RingKV,
    coded: CodedSegment | None,
    key_codec: Affine | None,
    value_codec: Affine | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
) -> tuple[Problem, tuple[Array, ...], tuple[Array, ...]]:
    """Returns what `launch` takes; arguments as in `decode_attention`."""
    batch, num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, slots = dense.keys.shape[1:3]
    dense_block = min(pl.cdiv(slots, tpu.LANES) * tpu.LANES, DENSE_BLOCK)
    step_bytes = 4 * dense_block * head_dim
    keys = values = Part(0, 0, False)
    tiles, codes = 0, ()
    table, count = jnp.zeros((batch, 1), jnp.int32), jnp.zeros(batch, jnp.int32)
    if coded is not None and coded.block_table.size:
        assert key_codec is not None and value_codec is not None
        spliced = _takes_e5m2()
        keys = Part(key_codec.bits, tpu.LANES // key_codec.tile[0], spliced)
        values = Part(value_codec.bits, max(1, head_dim // value_codec.tile[1]), spliced)
        tiles, codes = coded.keys.num_tiles, (coded.keys.words, coded.values.words)
        table, count = coded.block_table, coded.num_coded
        step_bytes += 4 * sum(math.prod(x.shape[2:]) for x in codes)
    heads = _largest_divisor(num_kv_heads, STEP_BYTES // step_bytes)
    problem = Problem(
        num_tokens=num_tokens,
        num_queries=num_q_heads // num_kv_heads,
        head_dim=head_dim,
        heads=heads,
        dense_slots=slots,
        dense_block=dense_block,
        tiles=tiles,
        tiles_at_once=_at_once(tiles, TILES_AT_ONCE // heads),
        keys=keys,
        values=values,
        sliding_window=sliding_window,
    )
    if isinstance(dense, RingKV):
        dense = dense.located(length)
    slot = jnp.arange(1, slots + 1, dtype=jnp.int32)
    dense_count = jnp.where(dense.positions >= 0, slot, 0).max((1, 2))
    rows = _arrange(problem, q.astype(jnp.float32) * (sm_scale * math.log2(math.e)))
    scalars = table, count, length, dense_count
    return problem, scalars, (rows, dense.positions[:, :, None], dense.keys, dense.values, *codes)


def _takes_e5m2() -> bool:
    """Returns whether the matrix unit multiplies bfloat16 by float8_e5m2."""
    if not tpu.available():  # to be interpreted
        return True
    return pltpu.get_tpu_info().is_matmul_supported(jnp.bfloat16, jnp.float8_e5m2)


def _at_once(tiles: int, most: int) -> int:
    """Returns how many tiles of a block to compute together: all, or whole registers of scales."""
    if tiles <= most or tiles % SUBLANES:
        return tiles
    return SUBLANES * _largest_divisor(tiles // SUBLANES, most // SUBLANES)


def _largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number up to `most`, or 1."""
    return max(n for n in range(1, max(most, 1) + 1) if number % n == 0)


def _arrange(p: Problem, q: Array) -> Array:
    """Returns queries `[B, K, rows, lanes]`, once for each tile and half, there in its lanes."""
    batch, num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = num_q_heads // p.num_queries
    q = q.reshape(batch, num_tokens, num_kv_heads, p.num_queries, head_dim).swapaxes(1, 2)
    q = q.reshape(batch, num_kv_heads, -1, head_dim)
    q = jnp.pad(q, [(0, 0), (0, 0), (0, p.queries - q.shape[2]), (0, 0)])
    halves = [
        jnp.pad(q, [(0, 0)] * 3 + [(i * head_dim, (p.halves - 1 - i) * head_dim)])
        for i in range(p.halves)
    ]
    return jnp.concatenate(halves * p.together, axis=2)


def launch(
    p: Problem, scalars: tuple[Array, ...], arrays: tuple[Array, ...]
) -> Float[Array, "B K R H"]:
    """Runs the kernel.

    Args:
      p: the sizes.
      scalars: block table, coded tokens, tokens, and dense slots up to the last one that has a
        token, of each row.
      arrays: queries and what they attend to; see `program.attend`.
    """
    q, positions, keys, _, *codes = arrays
    batch, num_heads, rows, lanes = q.shape
    shared = positions.shape[1] == 1  # by all heads

    # Beyond what a row holds, the last block comes again: it is not copied twice.
    def dense_index(b, h, i, table, count, length, dense_count):
        last = pl.cdiv(jnp.maximum(dense_count[b], 1), p.dense_block) - 1
        return b, h, jnp.minimum(i, last), 0

    def positions_index(*args):
        b, h, i, _ = dense_index(*args)
        return b, 0 if shared else h, 0, i

    def code_index(b, h, i, table, count, *_):
        last = jax.lax.div(jnp.maximum(count[b] - 1, 0), p.tiles * p.tile_tokens)
        return table[b, jnp.clip(i - (p.dense_steps - 1), 0, last)], h, 0, 0

    def row_index(b, h, *_):
        return b, h, 0, 0

    def spec(index, *shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), index)

    float32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    scratch = [float32((p.heads, rows, n)) for n in (tpu.LANES, tpu.LANES, lanes)]
    if codes:
        copies = p.tiles_at_once // p.together * rows
        for groups in (p.keys.groups * p.chunks, p.values.groups):
            scratch.append(float32((2, p.heads, groups, copies, tpu.LANES)))
    return pl.pallas_call(
        functools.partial(program.attend, p),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(
                batch,
                num_heads // p.heads,
                p.dense_steps - 1 + scalars[0].shape[1],
            ),
            in_specs=[
                spec(row_index, p.heads, rows, lanes),
                spec(positions_index, 1 if shared else p.heads, 1, p.dense_block),
                spec(dense_index, p.heads, p.dense_block, p.head_dim),
                spec(dense_index, p.heads, p.dense_block, p.head_dim),
                *(spec(code_index, p.heads, *x.shape[2:]) for x in codes),
            ],
            out_specs=spec(row_index, p.heads, p.queries, p.head_dim),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, p.queries, p.head_dim), keys.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="decode_attention",
    )(*scalars, *arrays)
