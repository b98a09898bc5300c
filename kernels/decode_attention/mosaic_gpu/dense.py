# SPDX-License-Identifier: Apache-2.0
"""The dense tokens: pools and window, in the dtype of the model."""

import functools
import math
from typing import NamedTuple

from kvq_jax.kernels.decode_attention.mosaic_gpu import warp
from kvq_jax.kernels.decode_attention.mosaic_gpu.problem import TILE
from kvq_jax.kernels.decode_attention.mosaic_gpu.state import HEADROOM, Running, Warp
from kvq_jax.kernels.decode_attention.mosaic_gpu.warp import Reg, integer, number

SPARSE_SLOTS = 1024  # with more dense slots, tiles without a visible token are passed over


class Tile(NamedTuple):
    """What a lane has loaded of 16 slots.

    Attributes:
      start: the first slot.
      listed: for each of `lane_rows` the position that stands in the list; () without one.
      keys: for each 16 channels a left operand.
      values: likewise.
    """

    start: Reg
    listed: list[Reg]
    keys: list[list[Reg]]
    values: list[list[Reg]]


class Dense:
    """The dense slots of the row and head of a warp, in tiles of 16.

    Args:
      me: the warp.
      keys: address.
      values: address.
      positions: addresses; of a ring its pool's, if it has one, and its start's.
      length: tokens of the row.
    """

    def __init__(self, me: Warp, keys: Reg, values: Reg, positions: list[Reg], length: Reg):
        self.me, self.keys, self.values, self.length = me, keys, values, length
        self.positions = positions
        if me.p.ring:
            (self.begin,) = warp.load(positions[-1] + me.row.wide * 4)

    def load(self, tile: Reg) -> Tile:
        """Loads a tile; of one past the last it loads other slots instead."""
        start = tile * TILE
        keys, values = self._load(self.keys, start), self._load(self.values, start)
        return Tile(start, self._listed(start), keys, values)

    def run(self, state: Running, first: Reg, last: Reg, ahead: Tile) -> Running:
        """Returns the state with tiles first to last added, of which the first is loaded."""

        @warp.branch(first < last, state)
        def begun():
            return self._add(state, ahead)

        @warp.loop(first + 1, last, begun)
        def after(tile, state):
            if self.me.p.dense_slots <= SPARSE_SLOTS:
                return self._add(state, self.load(tile))
            start = tile * TILE
            visible = self._visible(start, self._listed(start))
            seen = functools.reduce(lambda x, y: x | y, visible)

            @warp.branch(warp.any_lane(seen), state)
            def added():
                return self._add(state, self.load(tile))

            return added

        return after

    def _visible(self, start: Reg, listed: list[Reg]) -> list[Reg]:
        """Returns for each of `lane_rows` and both columns whether the query sees the token."""
        me, p = self.me, self.me.p
        result = []
        for i, row in enumerate(me.lane_rows):
            slot = start + row
            position = listed[i] if listed else integer(-1)
            if p.ring:
                last, pool = self.length - 1, p.dense_slots - p.ring
                in_ring = last - (last + p.dense_slots - slot) % p.ring
                in_ring = warp.where(in_ring >= self.begin, in_ring, integer(-1))
                position = warp.where(slot < pool, position, in_ring)
            exists = (position >= 0) & (slot < p.dense_slots)
            for column in range(2):
                token, _, _ = me.query(me.column + column)
                distance = self.length - p.num_tokens + token - position
                visible = exists & (distance >= 0)
                if p.sliding_window is not None:
                    visible &= distance < p.sliding_window
                result.append(visible)
        return result

    def _listed(self, start: Reg) -> list[Reg]:
        """Returns positions from the list, -1 for no token; any for slots that aren't in it."""
        me, p = self.me, self.me.p
        count = p.dense_slots - p.ring
        if not count:
            return []
        row = me.row * p.num_kv_heads + me.kv_head if p.positions_heads > 1 else me.row
        slots = [(start + row).min(integer(count - 1)) for row in me.lane_rows]
        return [warp.load(self.positions[0] + (row * count + x).wide * 4)[0] for x in slots]

    def _load(self, base: Reg, start: Reg) -> list[list[Reg]]:
        """Returns what the lane has of 16 tokens, for each 16 channels: (row, i // 2 or i % 2)."""
        me, p = self.me, self.me.p
        head = me.row * p.num_kv_heads + me.kv_head
        rows = []
        for i in (0, 8):
            slot = (start + me.g + i).min(integer(p.dense_slots - 1))
            at = base + (head * p.dense_slots + slot).wide * (2 * p.head_dim) + (me.t * 16).wide
            rows.append([x for j in range(0, 2 * p.head_dim, 64) for x in warp.load(at + j, 4)])
        return [
            [row[2 * tile + i] for row in rows for i in range(2)]
            for tile in range(p.head_dim // TILE)
        ]

    def _add(self, state: Running, tile: Tile) -> Running:
        """Returns the state with 16 slots added."""
        me, p = self.me, self.me.p
        visible = self._visible(tile.start, tile.listed)
        acc = [number(0.0)] * 4
        for (a0, a2, a1, a3), b in zip(tile.keys, me.operand(2), strict=True):
            acc = warp.mma(acc, [a0, a1, a2, a3], b, p.dtype)
        scores = [x * (p.sm_scale * math.log2(math.e)) for row in me.own_rows(acc) for x in row]
        scores = [
            warp.where(see, x, number(-math.inf)) for see, x in zip(visible, scores, strict=True)
        ]
        reference = []
        for i, old in enumerate(state.reference):
            peak = warp.reduce(functools.reduce(Reg.max, scores[i::2]), Reg.max, me.column_lanes)
            reference.append(old.max(peak - HEADROOM))
        decay = [warp.exp2(m - n) for m, n in zip(state.reference, reference, strict=True)]
        state = state.scaled(decay, reference)
        weights = [warp.exp2(x - reference[i % 2]) for i, x in enumerate(scores)]
        total = [sum(weights[i::2], x) for i, x in enumerate(state.total)]

        # Two parts carry the weights with twice the digits of the model's dtype.
        pairs = list(zip(weights[::2], weights[1::2], strict=True))
        high = [warp.pack(x, y, p.dtype) for x, y in pairs]
        low = []
        for (x, y), rounded in zip(pairs, high, strict=True):
            x_high, y_high = warp.unpack(rounded, p.dtype)
            low.append(warp.pack(x - x_high, y - y_high, p.dtype))
        operands = [me.weight_operand(x) for x in (high, low)]
        out = []
        for x, words in zip(state.out, tile.values, strict=True):
            a = [warp.transpose(word) for word in words]
            for b in operands:
                x = warp.mma(x, a, b, p.dtype)
            out.append(x)
        return state._replace(out=out, total=total)
