# SPDX-License-Identifier: Apache-2.0
"""What the launches do: queries, both segments, and the merging of all parts."""

import functools
import math

from jax.experimental.mosaic.gpu import utils as mgpu_utils

from kvq_jax.kernels.decode_attention.block_sizes import BlockSizes
from kvq_jax.kernels.decode_attention.mosaic_gpu import warp
from kvq_jax.kernels.decode_attention.mosaic_gpu.coded import Units
from kvq_jax.kernels.decode_attention.mosaic_gpu.dense import Dense
from kvq_jax.kernels.decode_attention.mosaic_gpu.problem import (
    COLUMNS,
    TILE,
    Memory,
    Problem,
    field_factor,
)
from kvq_jax.kernels.decode_attention.mosaic_gpu.state import NOTHING, Running, Warp, query
from kvq_jax.kernels.decode_attention.mosaic_gpu.warp import Reg, integer, number


def attend(p: Problem, sizes: BlockSizes, memory: Memory, inputs, outputs, shared: Reg) -> None:
    """The first launch."""
    q, length, keys, values, *rest = inputs
    count = 4 if p.key_bits else 0  # of the coded segment
    positions, coded = rest[: len(rest) - count], rest[len(rest) - count :]
    warp_index = Reg(mgpu_utils.warp_idx(sync=True))
    team = warp_index // sizes.warps
    index, split = warp.block_index() // sizes.splits, warp.block_index() % sizes.splits
    # Teams beyond the last do its work once more, and write the same.
    index = (index * sizes.teams + team).min(integer(p.work.rows - 1))
    column_tile, index = index % p.column_tiles, index // p.column_tiles
    me = Warp(
        p,
        sizes,
        memory,
        row=index // p.num_kv_heads,
        kv_head=index % p.num_kv_heads,
        column_tile=column_tile,
        split=split,
        team=team,
        warp=warp_index % sizes.warps,
        lane=warp.thread_index() % 32,
        thread=warp.thread_index() % (32 * sizes.warps),
        shared=shared + team * memory.team,
    )
    share = split * sizes.warps + me.warp  # of all warps of the row
    shares = sizes.splits * sizes.warps

    (row_length,) = warp.load(length + (me.row * 4).wide)
    units = None
    if coded:
        *codes, table, num_coded = coded
        (num_coded,) = warp.load(num_coded + (me.row * 4).wide)
        begin, end = integer(0), (num_coded + (sizes.unit - 1)) // sizes.unit
        if p.sliding_window is not None:
            first_seen = row_length - (p.num_tokens + p.sliding_window - 1)
            begin = (first_seen.max(integer(0)) // sizes.unit).min(end)
        count = end - begin
        first, last = (begin + count * x // sizes.splits for x in (split, split + 1))
        units = Units(me, codes, table, first, last, row_length)
    # What is needed first is asked for before the units: once all multiprocessors have asked for
    # theirs, everything waits behind them.
    queries = load_queries(me, q)
    dense = Dense(me, keys, values, positions, row_length)
    tiles = math.ceil(p.dense_slots / TILE)
    first_tile, last_tile = (integer(tiles) * x // shares for x in (share, share + 1))
    ahead = dense.load(first_tile)
    if units:
        units.start()
    write_operands(me, queries)
    me.sync_team()

    zero = number(0.0)
    state = Running(
        out=[[zero] * 4 for _ in range(p.head_dim // TILE)],
        total=[zero] * 2,
        offset=[[zero] * 2 for _ in range(p.value_groups)],
        reference=[number(NOTHING)] * 2,
    )
    state = dense.run(state, first_tile, last_tile, ahead)
    if units:
        # The output of the dense segment in units of the fields to come.
        out = [
            [x * (1 / field_factor(p.value_bits, i)) for x in tile]
            for i, tile in enumerate(state.out)
        ]
        state = units.run(state._replace(out=out))
    if p.capacity is not None:
        overflow = row_length > p.capacity
        total = [warp.where(overflow, number(math.nan), x) for x in state.total]
        state = state._replace(total=total)
    finish(me, state, outputs)


def load_queries(me: Warp, q: Reg) -> list[list[Reg]]:
    """Loads the queries that a thread writes as operands: 8 channels of a column at a time."""
    p = me.p
    result = []
    for index in _parts(me):
        column, part = _place(p, index)
        token, head, valid = me.query(column)
        index = (me.row * p.num_tokens + token) * p.num_q_heads + head
        words = warp.load(q + index.wide * (2 * p.head_dim) + (part * 16).wide, 4)
        result.append([warp.where(valid, x, integer(0)) for x in words])
    return result


def write_operands(me: Warp, queries: list[list[Reg]]) -> None:
    """Writes the queries to shared memory, in the order of the right operand.

    Queries are divided by the power of 2 above their largest element, so that their product with
    a scale, a float16, is one too.
    """
    for index, words in zip(_parts(me), queries, strict=True):
        with warp.when(index < me.p.head_dim):
            _write_part(me, words, *_place(me.p, index))


def _parts(me: Warp) -> list[Reg]:
    """Returns what a thread writes: indices of parts, of which there are 8 columns' H / 8."""
    return [me.thread + start for start in range(0, me.p.head_dim, 32 * me.sizes.warps)]


def _place(p: Problem, index: Reg) -> tuple[Reg, Reg]:
    """Returns column and part of it; indices past the last take the last."""
    index = index.min(integer(p.head_dim - 1))
    return index // (p.head_dim // 8), index % (p.head_dim // 8)


def _write_part(me: Warp, words: list[Reg], column: Reg, part: Reg) -> None:
    """Writes 8 channels of a column of queries; its other parts are in neighbouring lanes."""
    p = me.p
    pairs = [warp.unpack(x, p.dtype) for x in words]
    top = number(0.0)
    for x in (x for pair in pairs for x in pair):
        top = top.max((x.bits & 0x7FFFFFFF).float)
    lanes = [1 << i for i in range((p.head_dim // 8).bit_length() - 1)]
    top = warp.reduce(top, Reg.max, lanes)
    exponent = (top.bits >> 23).max(integer(64)).min(integer(190))
    shrink = ((integer(253) - exponent) << 23).float
    grow = ((exponent + 1) << 23).float
    with warp.when(part.equals(0)):
        factor = grow * (p.sm_scale * math.log2(math.e))
        warp.store(me.shared + me.memory.queries - 4 * COLUMNS + column * 4, factor)
    at = me.shared + me.memory.queries
    at = at + (part // 4) * 512 + (column * 4 + part % 4) * 16
    for i, (word, (x, y)) in enumerate(zip(words, pairs, strict=True)):
        # The next tile of channels is `key_bits` further up in a byte, until that is full.
        place = ((part // 4 * 2 + i // 2) * p.key_bits) % 8
        field = ((integer(127) - place) << 23).float
        x, y = x * shrink, y * shrink
        for which, content in enumerate(
            (warp.pack(x * field, y * field, "f16"), warp.pack(x, y, "f16"), word)
        ):
            warp.store(at + (which * 2 * COLUMNS * p.head_dim + i * 4), content)


def finish(me: Warp, state: Running, outputs) -> None:
    """Merges the warps of the team and writes its result."""
    p, warps = me.p, me.sizes.warps
    lanes = me.column_lanes
    total = [warp.reduce(x, Reg.__add__, lanes) for x in state.total]
    offset = [[warp.reduce(x, Reg.__add__, lanes) for x in xs] for xs in state.offset]
    me.sync_team()  # the stages become free
    outs = me.shared + me.memory.stages
    stride = p.head_dim + 1  # lanes of different columns write to different banks
    sums = outs + warps * p.columns * stride * 4
    merged = sums + warps * p.columns * 8
    with warp.when(me.t * 2 < p.columns):
        for i in range(2):
            column = me.warp * p.columns + me.column + i
            for across, tile in enumerate(state.out):
                group = across * p.value_groups * TILE // p.head_dim
                for half in range(2):
                    x = tile[2 * half + i]
                    x = warp.fma(x, number(field_factor(p.value_bits, across)), offset[group][i])
                    channel = 32 * (across // 2) + 4 * (across % 2) + 2 * half
                    at = column * stride + (me.g >> 1) * 8 + (me.g & 1) + channel
                    warp.store(outs + at * 4, x)
            with warp.when(me.g.equals(0)):
                warp.store(sums + column * 8, total[i])
                warp.store(sums + column * 8 + 4, state.reference[i])
    me.sync_team()

    threads = 32 * warps
    elements, warp_size = p.columns * p.head_dim, p.columns * stride
    for start in range(0, elements, threads):
        index = me.thread + start
        with warp.when(index < elements):
            column, channel = index // p.head_dim, index % p.head_dim
            parts = []
            for w in range(warps):
                (x,) = warp.load(outs + (column * stride + channel + w * warp_size) * 4)
                total, reference = warp.load(sums + (column + w * p.columns) * 8, 2)
                parts.append((x.float, total.float, reference.float))
            out, total, reference = _merge_parts(parts)
            if me.sizes.splits == 1:
                _write(p, outputs[0], me.query(column), channel, out, total, me.row)
            elif me.sizes.cluster > 1:
                warp.store(merged + index * 4, out)
                with warp.when(channel.equals(0)):
                    at = merged + elements * 4 + column * 8
                    warp.store(at, total)
                    warp.store(at + 4, reference)
            else:
                out_at, sums_at = outputs
                row = (me.row * p.num_kv_heads + me.kv_head) * p.column_tiles
                row = (row + me.column_tile) * me.sizes.splits + me.split
                warp.store(out_at + (row * elements + index).wide * 4, out)
                with warp.when(channel.equals(0)):
                    at = sums_at + (row * p.columns + column).wide * 8
                    warp.store(at, total)
                    warp.store(at + 4, reference)
    if me.sizes.cluster > 1:
        _merge_cluster(me, merged, outputs[0])


def _merge_cluster(me: Warp, merged: Reg, out: Reg) -> None:
    """Merges the splits of a row, of which each block of the cluster has one; each writes some."""
    p, splits = me.p, me.sizes.splits
    elements, threads = p.columns * p.head_dim, 32 * me.sizes.warps
    warp.sync_cluster()
    for start in range(0, elements, splits * threads):
        index = me.split * threads + me.thread + start
        with warp.when(index < elements):
            column, channel = index // p.head_dim, index % p.head_dim
            parts = []
            for rank in range(splits):
                (x,) = warp.load_remote(merged + index * 4, rank)
                sums = warp.load_remote(merged + elements * 4 + column * 8, rank, 2)
                parts.append((x.float, sums[0].float, sums[1].float))
            x, total, _ = _merge_parts(parts)
            _write(p, out, me.query(column), channel, x, total, me.row)
    warp.sync_cluster()  # nobody leaves while others read


def _merge_parts(parts: list[tuple[Reg, Reg, Reg]]) -> tuple[Reg, Reg, Reg]:
    """Merges (output, total weight, reference) of parts of the tokens."""
    reference = functools.reduce(Reg.max, (m for _, _, m in parts))
    factors = [warp.exp2(m - reference) for _, _, m in parts]
    out, total = (
        functools.reduce(
            lambda x, y: warp.fma(*y, x),
            ((part[i], f) for part, f in zip(parts, factors, strict=True)),
            number(0.0),
        )
        for i in range(2)
    )
    return out, total, reference


def _write(p: Problem, out: Reg, target, channel: Reg, x: Reg, total: Reg, row: Reg) -> None:
    """Writes one element of the result; a query that saw no token gives 0."""
    token, head, valid = target
    x = warp.where(total.equals(0), number(0.0), x * warp.reciprocal(total))
    index = ((row * p.num_tokens + token) * p.num_q_heads + head) * p.head_dim + channel
    with warp.when(valid):
        warp.store_half(out + index.wide * 2, x, p.dtype)


def merge(p: Problem, sizes: BlockSizes, inputs, outputs, shared: None) -> None:
    """The second launch: a block merges one column of a row."""
    del shared
    (outs, sums), (out,) = inputs, outputs
    thread, index = warp.thread_index(), warp.block_index()
    column, tile = index % p.columns, index // p.columns
    column_tile, head = tile % p.column_tiles, tile // p.column_tiles
    row, kv_head = head // p.num_kv_heads, head % p.num_kv_heads
    for start in range(0, p.head_dim, 128):
        channel = thread + start
        with warp.when(channel < p.head_dim):
            parts = []
            for split in range(sizes.splits):
                at = (tile * sizes.splits + split) * p.columns + column
                (x,) = warp.load(outs + (at * p.head_dim + channel).wide * 4)
                total, reference = warp.load(sums + at.wide * 8, 2)
                parts.append((x.float, total.float, reference.float))
            x, total, _ = _merge_parts(parts)
            target = query(p, column_tile, kv_head, column)
            _write(p, out, target, channel, x, total, row)
