# SPDX-License-Identifier: Apache-2.0
"""What one step of the grid computes: a block of dense slots or of codes, for some KV heads."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvq_jax.kernels.decode_attention.mosaic_tpu.operands import (
    by_lane,
    by_row,
    float32,
    operand,
    product,
    split,
    stack,
)
from kvq_jax.kernels.decode_attention.mosaic_tpu.problem import Problem
from kvq_jax.kernels.decode_attention.tpu import LANES

# Scores of no weight, and where the running maximum starts: so far apart that exp2 of the
# difference is 0 though nothing else was seen.
MASKED = -3e38
LOWEST = -1e30


class Scratch(NamedTuple):
    """What the steps of a row remember, and space to work in; all float32, in VMEM.

    Attributes:
      top: running maximum of the scores, `[heads, rows, 128]`, the same in all lanes.
      total: of the weights, `[heads, rows, 128]`; to be summed over the lanes.
      out: of the weighted values, `[heads, rows, lanes]`.
      key_scales: scales and minima of keys, each row of them once for each row that it meets,
        `[2, heads, groups and chunks, rows, 128]`.
      value_scales: of values, likewise, `[2, heads, groups, rows, 128]`.
    """

    top: Any
    total: Any
    out: Any
    key_scales: Any = None
    value_scales: Any = None


def attend(p: Problem, table, count, length, dense_count, q, positions, keys, values, *refs: Any):
    """Runs one step.

    Args:
      p: the sizes.
      table: int32[B, M], blocks of each row.
      count: int32[B], coded tokens of each row.
      length: int32[B], tokens of each row.
      dense_count: int32[B], dense slots of each row up to the last one that has a token.
      q: float32 `[1, heads, rows, lanes]`, as `launch` arranges them; their scores are logarithms
        to the base of 2.
      positions: int32 `[1, k, 1, slots]`, of dense slots.
      keys: dense ones `[1, heads, slots, H]`.
      values: likewise.
      *refs: blocks of codes of keys and of values, if there are any; the output
        `[1, heads, queries, H]`; what is in `Scratch`.
    """
    del table  # is for the copies
    codes = refs[:2] if p.tiles else ()
    out, *rest = refs[len(codes) :]
    scratch = Scratch(*rest)
    row, step = pl.program_id(0), pl.program_id(2)
    at = length[row] - p.num_tokens + _token(p)

    @pl.when(step == 0)
    def _():
        scratch.top[...] = jnp.full_like(scratch.top, LOWEST)
        scratch.total[...] = jnp.zeros_like(scratch.total)
        scratch.out[...] = jnp.zeros_like(scratch.out)

    # In turn for all heads: so the matrix unit has always something to do.
    @pl.when((step < p.dense_steps) & (step * p.dense_block < dense_count[row]))
    def _():
        shared = positions.shape[1] == 1  # by all heads
        start = step * p.dense_block
        weights = [
            _weigh_dense(
                p, start, at, q[0, h], positions[0, 0 if shared else h], keys[0, h], h, scratch
            )
            for h in range(p.heads)
        ]
        for h in range(p.heads):
            _add_dense(p, start, *weights[h], values[0, h], h, scratch)

    if codes:
        block = step - (p.dense_steps - 1)

        @pl.when(block >= 0)
        def _():
            def some(i, carry):
                tile = pl.multiple_of(i * p.tiles_at_once, p.tiles_at_once)
                first = (block * p.tiles + tile) * p.tile_tokens
                key_refs, value_refs = ([ref.at[0, h] for h in range(p.heads)] for ref in codes)
                weights = [
                    _weigh(p, first, tile, at, q[0, h], key_refs[h], value_refs[h], h, scratch)
                    for h in range(p.heads)
                ]
                for h in range(p.heads):
                    _add_values(p, tile, *weights[h], value_refs[h], h, scratch)
                return carry

            left = count[row] - block * p.tiles * p.tile_tokens
            jax.lax.fori_loop(0, occupied(p, left), some, None)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for h in range(p.heads):
            out[0, h] = _merged(p, h, scratch).astype(out.dtype)


def occupied(p: Problem, tokens):
    """Returns how many times `tiles_at_once` of a block hold its tokens."""
    size = p.tiles_at_once * p.tile_tokens
    return jnp.clip(pl.cdiv(tokens, size), 0, p.tiles // p.tiles_at_once)


def _token(p: Problem):
    """Returns which of the T tokens each row belongs to, `[rows, 1]`."""
    query = jax.lax.broadcasted_iota(jnp.int32, (p.rows, 1), 0) % p.queries
    starts = (query >= p.num_queries * t for t in range(1, p.num_tokens))
    return sum((x.astype(jnp.int32) for x in starts), jnp.zeros_like(query))


def _visible(p: Problem, at, positions, *, latest: bool):
    """Returns which positions the rows' tokens see; None for all.

    Args:
      p: the sizes.
      at: position of each row's own token.
      positions: of keys.
      latest: whether a key may come after the only new token.
    """
    visible = None
    if latest or p.num_tokens > 1:
        visible = positions <= at
    if p.sliding_window is not None:
        near = positions > at - p.sliding_window
        visible = near if visible is None else visible & near
    return visible


def _softmax(scores, head: int, scratch: Scratch):
    """Returns weights of scores, each `[rows, 128]`, and by what the output is to be multiplied."""
    old_top = scratch.top[head]
    highest = functools.reduce(jnp.maximum, scores).max(-1, keepdims=True)
    top = jnp.maximum(old_top, highest)
    decay = jnp.exp2(old_top - top)
    weights = [jnp.exp2(score - top) for score in scores]
    scratch.top[head] = top
    scratch.total[head] = scratch.total[head] * decay + functools.reduce(jnp.add, weights)
    return weights, decay


def _add(out, decay, head: int, scratch: Scratch):
    decay = stack([decay] * (out.shape[1] // LANES), 1)
    scratch.out[head] = scratch.out[head] * decay + out


def _weigh_dense(p: Problem, start, at, q, positions, keys, head: int, scratch: Scratch):
    """Attends to the keys of dense slots, in the rows of the first tile's first half.

    Returns:
      The left operand for the values, and by what the output so far is to be multiplied.
    """
    scores = product(split(q[:, : p.head_dim]), keys, transposed=True)
    row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    visible = (positions >= 0) & (row < p.queries) & _visible(p, at, positions, latest=True)
    if p.dense_slots % p.dense_block:
        slot = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible &= slot < p.dense_slots
    scores = jnp.where(visible, scores, MASKED)
    weights, decay = _softmax(jnp.split(scores, scores.shape[1] // LANES, 1), head, scratch)
    return split(stack(weights, 1)), decay


def _add_dense(p: Problem, start, weights, decay, values, head: int, scratch: Scratch):
    """Adds the weighted values of dense slots to the output."""
    if p.dense_slots % p.dense_block:  # what was copied from beyond the end may be anything
        pairs = pltpu.bitcast(values, jnp.int32)
        left = p.dense_slots - start - 2 * jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 0)
        pairs &= jnp.where(left > 1, -1, jnp.where(left > 0, 0xFFFF, 0))
        values = pltpu.bitcast(pairs, values.dtype)
    out = product(weights, values)
    _add(stack([out] + [jnp.zeros_like(out)] * (p.halves - 1), 1), decay, head, scratch)


def _weigh(p: Problem, first, tile, at, q, keys, values, head: int, scratch: Scratch):
    """Attends to the keys of tiles of codes.

    Args:
      p: the sizes.
      first: position of their first token.
      tile: the first of them, in the block.
      at: position of each row's own token.
      q: queries.
      keys: the block's codes of keys.
      values: of values.
      head: KV head.
      scratch: see `Scratch`.

    Returns:
      The left operand for the values; what their minima add to the output, for each group of
      channels; and by what the output so far is to be multiplied.
    """
    passes = [range(i, i + p.together) for i in range(0, p.tiles_at_once, p.together)]
    for group in range(p.keys.groups * p.chunks):
        start = p.tiles * (p.keys.words * p.chunks + group) + tile
        pair = p.keys.affine(*float32(keys[pl.ds(start, p.tiles_at_once)]))
        _repeat_rows(pair, p.rows // p.together, scratch.key_scales, head, group)
    for group in range(p.values.groups):
        start = p.tiles * p.values.words * p.chunks + (group * p.tiles + tile) * p.halves
        pair = p.values.affine(*float32(values[pl.ds(start, p.tiles_at_once * p.halves)]))
        _repeat_rows(pair, p.queries, scratch.value_scales, head, group)

    piece = jax.lax.broadcasted_iota(jnp.int32, (p.rows, LANES), 0) // p.queries
    offset = piece * LANES + jax.lax.broadcasted_iota(jnp.int32, (p.rows, LANES), 1)
    chunks = range(p.chunks)
    scores = []
    for i, tiles in enumerate(passes):
        rows = pl.ds(i * p.rows, p.rows)
        queries, rests = [], []
        for group in range(p.keys.groups):
            scale, minimum = (
                stack((scratch.key_scales[x, head, group * p.chunks + c, rows] for c in chunks), 1)
                for x in (0, 1)
            )
            queries.append(q * scale)
            rests.append((q * minimum).sum(-1, keepdims=True))
        operands = [_operand(p, p.keys, keys, tile + t, 0) for t in tiles]
        found = _own(p, split(stack(queries, 0)), stack(operands, 1))
        score = by_lane([x + y for x, y in zip(found, rests, strict=True)], LANES)
        held = scratch.value_scales[0, head, 0, rows] != 0
        positions = first + tiles[0] * p.tile_tokens + offset
        if (visible := _visible(p, at, positions, latest=False)) is not None:
            held &= visible
        scores.append(jnp.where(held, score, MASKED))

    weights, decay = _softmax(scores, head, scratch)
    lefts, rests = [], []
    for group in range(p.values.groups):
        left, rest = [], jnp.zeros((p.rows, LANES), jnp.float32)
        for i, weight in enumerate(weights):
            rows = pl.ds(i * p.rows, p.rows)
            left.append(weight * scratch.value_scales[0, head, group, rows])
            rest += weight * scratch.value_scales[1, head, group, rows]
        lefts.append(stack(left, 1))
        rests.append(rest.sum(-1, keepdims=True))
    return split(stack(lefts, 0)), rests, decay


def _add_values(p: Problem, tile, left, rests, decay, values, head: int, scratch: Scratch):
    """Adds the weighted values of tiles of codes to the output; see `_weigh`."""
    operands = []
    for i in range(0, p.tiles_at_once, p.together):
        tiles = [_operand(p, p.values, values, tile + i + t, 1) for t in range(p.together)]
        operands.append(stack(tiles, 1))
    found = _own(p, left, stack(operands, 0))
    _add(
        by_lane([x + y for x, y in zip(found, rests, strict=True)], p.head_dim),
        decay,
        head,
        scratch,
    )


def _repeat_rows(pair, copies: int, scales, head: int, group: int):
    """Writes each row of scale and minimum so many times, to be read as whole registers."""
    for i, x in enumerate(pair):
        target = scales.at[i, head, group]
        for copy in range(copies):
            target[pl.ds(copy, x.shape[0], stride=copies)] = x


def _operand(p: Problem, part, codes, tile, axis: int):
    """Returns the operand of a tile; its chunks of channels go along an axis."""
    size = part.words
    chunks = (tile * p.chunks + i for i in range(p.chunks))
    return stack([operand(codes[pl.ds(i * size, size)], part) for i in chunks], axis)


def _own(p: Problem, left, right):
    """Returns left · right for each stack of rows in `left`, of each tile what is its own."""
    found = product(left, right)
    found = jnp.split(found, found.shape[0] // p.rows)
    return [by_row(jnp.split(x, p.together, axis=1)) for x in found]


def _merged(p: Problem, head: int, scratch: Scratch):
    """Returns the output `[queries, H]` of all pieces of rows together."""
    top, out = scratch.top[head][:, :1], scratch.out[head]
    total = scratch.total[head].sum(-1, keepdims=True)
    pieces = [slice(i, i + p.queries) for i in range(0, p.rows, p.queries)]
    highest = functools.reduce(jnp.maximum, (top[x] for x in pieces))
    numerator, denominator = 0.0, 0.0
    for i, x in enumerate(pieces):
        weight = jnp.exp2(top[x] - highest)
        lane = i % p.halves * p.head_dim
        numerator += out[x, lane : lane + p.head_dim] * weight
        denominator += total[x] * weight
    return numerator / jnp.where(denominator == 0, 1.0, denominator)
