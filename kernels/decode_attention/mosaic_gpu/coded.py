# SPDX-License-Identifier: Apache-2.0
"""The coded tokens: units of them come through shared memory, and are never decoded."""

import dataclasses
import math

from kvq_jax.kernels.decode_attention.mosaic_gpu import warp
from kvq_jax.kernels.decode_attention.mosaic_gpu.problem import COLUMNS, SUBNORMAL, TILE
from kvq_jax.kernels.decode_attention.mosaic_gpu.state import HEADROOM, Running, Warp
from kvq_jax.kernels.decode_attention.mosaic_gpu.warp import Reg, integer, number


@dataclasses.dataclass
class Units:
    """The units of coded tokens of a warp, as they come through shared memory.

    The warps of a team take one unit in turn, so that what they read together lies together.

    Attributes:
      me: the warp.
      coded: addresses of keys and values.
      table: address of the block table.
      first: unit of the team's first warp.
      last: unit after the team's last.
      length: tokens of the row.
    """

    me: Warp
    coded: list[Reg]
    table: Reg
    first: Reg
    last: Reg
    length: Reg

    def __post_init__(self):
        me, memory = self.me, self.me.memory
        self.sizes = memory.keys, memory.values
        factors = me.shared + memory.queries - 4 * COLUMNS + me.column * 4
        self.factors = [factors, factors + 4]
        self.first_blocks = [self._physical(integer(i)) for i in range(me.sizes.stages)]

    def start(self) -> None:
        """Asks for the first units."""
        me = self.me
        with warp.when(me.lane.equals(0)):
            for stage in range(me.sizes.stages):
                for which in range(2):
                    warp.init_barrier(self._barrier(which, integer(stage)))
        warp.sync_warp()
        for i, physical in enumerate(self.first_blocks):
            for which in range(2):
                self._fetch(which, integer(i), physical)

    def _unit(self, turn: Reg) -> Reg:
        """Returns the unit that is this warp's in a turn."""
        return self.first + self.me.warp + turn * self.me.sizes.warps

    def _barrier(self, which: int, stage: Reg) -> Reg:
        """Returns the address of the barrier of keys (0) or values (1) of a stage."""
        me = self.me
        return me.shared + (me.warp * me.sizes.stages + stage) * 16 + 8 * which

    def _address(self, which: int, stage: Reg) -> Reg:
        """Returns the address of the keys or values of a stage."""
        me, (keys, values) = self.me, self.sizes
        index = me.warp * me.sizes.stages + stage
        at = me.shared + me.memory.stages + index * (keys.total + values.total)
        return at + keys.total if which else at

    def _physical(self, turn: Reg) -> Reg:
        """Returns the block of memory that holds the unit of a turn (or, past the last, any)."""
        p = self.me.p
        index = self._unit(turn) // (p.groups_per_block * p.group_size // self.me.sizes.unit)
        index = index.min(integer(p.blocks_per_row - 1))
        (block,) = warp.load(self.table + (self.me.row * p.blocks_per_row + index).wide * 4)
        return block

    def _fetch(self, which: int, turn: Reg, physical: Reg) -> None:
        """Asks for the keys (0) or values (1) of the unit of a turn, if there is one."""
        p, size, unit = self.me.p, self.sizes[which], self._unit(turn)
        stage = turn % self.me.sizes.stages
        stage, barrier = self._address(which, stage), self._barrier(which, stage)
        with warp.when((unit < self.last) & self.me.lane.equals(0)):
            token = unit * self.me.sizes.unit % (p.groups_per_block * p.group_size)
            group = (physical * p.num_kv_heads + self.me.kv_head) * p.groups_per_block
            group = group + token // p.group_size
            source = self.coded[which] + group.wide * size.group
            warp.expect_bytes(barrier, size.total)
            if self.me.sizes.unit >= p.group_size:
                warp.copy_async(stage, source, size.total, barrier)
            else:
                tokens = self.me.sizes.unit
                part = token % p.group_size // tokens
                words = source + (part * size.words).wide
                warp.copy_async(stage, words, size.words, barrier)
                scales = source + size.group_words
                if which == 1:  # a token's own; those of keys are the group's
                    scales = scales + (part * size.scales).wide
                warp.copy_async(stage + size.words, scales, size.scales, barrier)

    def run(self, state: Running) -> Running:
        """Returns the state with all units of the warp added."""

        stages, warps = self.me.sizes.stages, self.me.sizes.warps
        turns = (self.last - self.first - self.me.warp + (warps - 1)) // warps

        @warp.loop(integer(0), turns, state)
        def after(turn, state):
            unit, stage, parity = self._unit(turn), turn % stages, (turn // stages) & 1
            keys, values = (self._address(which, stage) for which in range(2))
            later = turn + stages
            physical = self._physical(later)
            warp.wait_barrier(self._barrier(0, stage), parity)
            scores, bias, factor = self._scores(keys)
            warp.sync_warp()
            self._fetch(0, later, physical)
            warp.wait_barrier(self._barrier(1, stage), parity)
            state, weights = self._weigh(state, unit, values, scores, bias, factor)
            state = self._add_values(state, values, weights)
            warp.sync_warp()
            self._fetch(1, later, physical)
            return state

        return after

    def _scores(self, keys: Reg) -> tuple[list, list, list[Reg]]:
        """Returns the scores of a unit, whose keys are there.

        Returns:
          For each tile of tokens the products of queries and fields, `own_rows`; for each group
          what to add to the score, for the two columns; and the factor of the products.
        """
        me, p = self.me, self.me.p
        scale_of = [x.float for at in self.factors for x in warp.load(at)]
        factor = [x * 2.0**SUBNORMAL for x in scale_of]
        size = self.sizes[0]
        scores, biases = [], []
        for group in range(size.groups):
            words = keys + group * size.stride
            at = words + size.words + me.t * 16
            chunks = range(0, 2 * p.head_dim, 64)
            scale = [x for i in chunks for x in warp.load(at + i, 4)]
            # The rounding of the scaled queries is made up for, as if all fields were average.
            scaled, rest = [], [number(0.0)] * 4
            for i, b in enumerate(me.operand(0)):
                factors = scale[2 * i : 2 * i + 2]
                rounded = [warp.multiply_halves(*pair) for pair in zip(b, factors, strict=True)]
                lost = [
                    warp.rest_of_product(*three) for three in zip(b, factors, rounded, strict=True)
                ]
                rest = warp.mma(rest, [average_field(p.key_bits, i)] * 4, lost, "f16")
                scaled.append(rounded)
            minimum = [x for i in chunks for x in warp.load(at + (2 * p.head_dim + i), 4)]
            bias = [number(0.0)] * 4
            for i, b in enumerate(me.operand(1)):
                low, high = minimum[2 * i : 2 * i + 2]
                bias = warp.mma(bias, [low, low, high, high], b, "f16")
            biases.append([warp.fma(rest[i], factor[i], bias[i] * scale_of[i]) for i in range(2)])
            for tiles in fields(words, me, p.key_bits, me.sizes.unit // size.groups):
                acc = [[number(0.0)] * 4 for _ in tiles]
                for across in range(p.head_dim // TILE):
                    for i, tile in enumerate(tiles):
                        acc[i] = warp.mma(acc[i], tile(across), scaled[across], "f16")
                scores += [me.own_rows(x) for x in acc]
        return scores, biases, factor

    def _weigh(
        self, state: Running, unit: Reg, values: Reg, scores, bias, factor
    ) -> tuple[Running, list]:
        """Returns the state with new totals, and the weights of each tile as right operands."""
        me, p, size = self.me, self.me.p, self.sizes[1]
        tiles_per_group = len(scores) // len(bias)

        seen_from = [self.length - p.num_tokens + me.query(me.column + i)[0] for i in range(2)]

        def tokens():
            """Yields tile, products, whether columns see the token, scales and minima."""
            for tile, rows in enumerate(scores):
                for row, products in zip(me.lane_rows, rows, strict=True):
                    group, first = divmod(tile, len(scores) // size.groups)
                    at = values + group * size.stride + size.words
                    at = at + (row + first * TILE) * (4 * p.value_groups)
                    pairs = [
                        warp.unpack(warp.load(at + 4 * i)[0], "f16") for i in range(p.value_groups)
                    ]
                    visible = [pairs[0][0] > 0] * 2
                    if p.positions_matter:
                        position = unit * me.sizes.unit + row + tile * TILE
                        distance = [x - position for x in seen_from]
                        visible = [v & (x >= 0) for v, x in zip(visible, distance, strict=True)]
                        if p.sliding_window is not None:
                            visible = [
                                v & (x < p.sliding_window)
                                for v, x in zip(visible, distance, strict=True)
                            ]
                    yield tile, products, visible, pairs

        def attempt(state: Running):
            """Weighs with the present reference; the last result is the largest weights."""
            total, offset = state.total, state.offset
            shifted = [[x - m for x, m in zip(b, state.reference, strict=True)] for b in bias]
            packed, top = [[] for _ in scores], integer(0)
            average = number((2**p.value_bits - 1) / 2)
            for tile, products, visible, pairs in tokens():
                terms = zip(
                    visible, products, factor, shifted[tile // tiles_per_group], strict=True
                )
                weights = [
                    warp.exp2(warp.where(see, warp.fma(x, f, b), number(-math.inf)))
                    for see, x, f, b in terms
                ]
                total = [x + w for x, w in zip(total, weights, strict=True)]
                words = []
                for i, (scale, minimum) in enumerate(pairs):
                    scaled = [w * scale for w in weights]
                    words.append(warp.pack(scaled[0], scaled[1], "f16"))
                    top = warp.max_halves(top, words[-1])
                    # What rounding loses is made up for, as if all fields were average.
                    sums = [
                        warp.fma(w, minimum, warp.fma(exact - rounded, average, x))
                        for w, exact, rounded, x in zip(
                            weights, scaled, warp.unpack(words[-1], "f16"), offset[i], strict=True
                        )
                    ]
                    offset = [*offset[:i], sums, *offset[i + 1 :]]
                packed[tile].append(words)
            return state._replace(total=total, offset=offset), packed, top

        first, packed, top = attempt(state)
        overflow = ((top & 0xFFFF) >= 0x7C00) | ((top >> 16) >= 0x7C00)

        @warp.branch(warp.any_lane(overflow), (first, packed))
        def result():
            peak, largest = [number(-math.inf)] * 2, number(0.0)
            for tile, products, visible, pairs in tokens():
                for scale, _ in pairs:
                    largest = largest.max(scale)
                for i, b in enumerate(bias[tile // tiles_per_group]):
                    score = warp.fma(products[i], factor[i], b)
                    peak[i] = peak[i].max(warp.where(visible[i], score, number(-math.inf)))
            largest = warp.log2(warp.reduce(largest, Reg.max, me.column_lanes))
            reference = [
                old.max(warp.reduce(x, Reg.max, me.column_lanes) + largest - HEADROOM)
                for x, old in zip(peak, state.reference, strict=True)
            ]
            decay = [warp.exp2(m - n) for m, n in zip(state.reference, reference, strict=True)]
            return attempt(state.scaled(decay, reference))[:2]

        state, packed = result
        weights = [
            [me.weight_operand([row[i] for row in rows]) for i in range(p.value_groups)]
            for rows in packed
        ]
        return state, weights

    def _add_values(self, state: Running, values: Reg, weights: list) -> Running:
        """Returns the state with the output of a unit added."""
        me, p = self.me, self.me.p
        out, size = [], self.sizes[1]
        # Tensor cores cut off what is small beside a sum. So that this sum is a unit's, and not
        # that of all so far, it is added up apart: some channels at a time, for want of registers.
        for first in range(0, p.head_dim // TILE, 4):
            sums, index = [[number(0.0)] * 4 for _ in range(4)], 0
            for group in range(size.groups):
                words = values + group * size.stride
                for tiles in fields(words, me, p.value_bits, me.sizes.unit // size.groups):
                    for i, x in enumerate(sums):
                        channels = (first + i) * p.value_groups * TILE // p.head_dim
                        for j, tile in enumerate(tiles):
                            x = warp.mma(x, tile(first + i), weights[index + j][channels], "f16")
                        sums[i] = x
                    index += len(tiles)
            for x, y in zip(state.out[first : first + 4], sums, strict=True):
                out.append([old + new for old, new in zip(x, y, strict=True)])
        return state._replace(out=out)


def fields(words: Reg, me: Warp, bits: int, num_tokens: int):
    """Yields tiles of tokens whose fields share words, or two of them, in the order of tokens.

    A tile is a function from the index of 16 channels to the left operand.
    """
    num_words = me.p.head_dim * bits // 256  # loads a lane makes for 16 tokens
    per_byte = 8 // bits

    def tile(loaded: list[list[Reg]], first_field: int):
        def operand(across: int) -> list[Reg]:
            which, field = divmod(first_field + across, 16 // bits)
            byte, place = divmod(field, per_byte)
            mask = ((1 << bits) - 1) << (bits * place)
            return [(x >> (8 * byte) if byte else x) & (mask * 0x10001) for x in loaded[which]]

        return operand

    at = words + me.lane * 16
    for token in range(0, num_tokens, 2 * TILE):
        if num_words:
            loaded = [
                [
                    warp.load(at + 512 * ((token // TILE + i) * num_words + j), 4)
                    for j in range(num_words)
                ]
                for i in range(2)
            ]
            yield [tile(x, 0) for x in loaded]
        else:  # few channels: one word has fields of two tiles
            loaded = [warp.load(at + 512 * (token // (2 * TILE)), 4)]
            yield [tile(loaded, 0), tile(loaded, me.p.head_dim // TILE)]


def average_field(bits: int, tile: int) -> Reg:
    """Returns a pair of fields of about the average, at the place they have in a tile."""
    field = 1 << (bits - 1) << bits * (tile % (8 // bits))
    return integer(field * 0x10001)
