# SPDX-License-Identifier: Apache-2.0
"""How the Mosaic GPU kernel cuts its work: measured sizes, and a model of cost for the others."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib

TUNED = pathlib.Path(__file__).parent / "tuned"

MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
# A model of an H200: bytes a second that one multiprocessor gets; how long it computes on a unit,
# and on a token of 128 channels; what a block of threads costs besides (queries, the dense
# segment, first and last copies), and the launch that merges splits.
BYTES_PER_SECOND = 4.3e12 / MULTIPROCESSORS
UNIT_SECONDS = 47e-9
TOKEN_SECONDS = 2.3e-9
BLOCK_SECONDS = 5e-6
MERGE_SECONDS = 3e-6
MAX_SPLITS = 64
MAX_CLUSTER = 2  # larger ones leave multiprocessors idle: their groups are not multiples of 4


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How the work is cut.

    Args:
      splits: teams that share the tokens of a row and KV head; two are blocks of one cluster,
        more are merged by another launch.
      warpgroups: of 4 warps in a block. A block of 4 warpgroups has the registers of one
        multiprocessor, 128 a thread.
      teams: groups of warps in a block that work apart.
      unit: tokens that a warp copies at a time; 32, 64 or 128.
      stages: units of a warp that are on their way or worked on.
    """

    splits: int
    warpgroups: int
    teams: int
    unit: int
    stages: int = 1

    @property
    def warps(self) -> int:
        """Warps of a team."""
        return 4 * self.warpgroups // self.teams

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits if self.splits <= MAX_CLUSTER else 1


@dataclasses.dataclass(frozen=True)
class Work:
    """What block sizes depend on.

    Args:
      rows: independent pieces of work: batch rows times KV heads times tiles of columns.
      tokens: coded tokens of a row at the most.
      columns: 4 or 8, of a matrix product.
      head_dim: H.
      key_bits: of a key's code; 0 for no codes.
      value_bits: of a value's code.
      group_size: tokens that share a key scale.
      dense_slots: tokens of a row that are not coded.
    """

    rows: int
    tokens: int
    columns: int
    head_dim: int
    key_bits: int
    value_bits: int
    group_size: int
    dense_slots: int

    def unit_bytes(self, unit: int) -> int:
        """Returns shared memory a warp needs for a unit, its scales included (per token 4)."""
        codes = unit * self.head_dim * (self.key_bits + self.value_bits) // 8
        return codes + max(1, unit // self.group_size) * 4 * self.head_dim + 16 * unit


def choose(work: Work) -> BlockSizes:
    """Returns the tuned sizes for this work, or those the model of cost likes best."""
    return _tuned().get(dataclasses.astuple(work)) or shortlist(work)[0]


@functools.lru_cache(maxsize=1024)
def shortlist(work: Work) -> list[BlockSizes]:
    """Returns sizes worth trying, one for each kind of block, the most promising first."""
    # 128 registers a thread don't suffice for an output of 256 channels.
    warpgroups = range(2, 5 if work.head_dim < 256 else 4)
    result = []
    for groups, teams, unit, stages in itertools.product(
        warpgroups, (1, 2, 4), (128, 64, 32), (1, 2)
    ):
        if 4 * groups % teams or not _fits(work, 4 * groups, unit, stages):
            continue
        most = (work.tokens // unit + work.dense_slots // 16) * teams // (4 * groups)
        splits = range(1, max(1, min(most, MAX_SPLITS)) + 1)
        kinds = [BlockSizes(n, groups, teams, unit, stages) for n in splits]
        result.append(min(kinds, key=functools.partial(_cost, work)))
    return sorted(result, key=lambda s: (_cost(work, s), s.stages, -s.unit, s.teams))


def _fits(work: Work, warps: int, unit: int, stages: int) -> bool:
    """Returns whether shared memory and registers suffice."""
    if unit == 128 and (work.columns == 8 or work.head_dim == 256):
        return False
    return warps * stages * work.unit_bytes(unit) + 16384 <= SHARED_BYTES


def _cost(work: Work, sizes: BlockSizes) -> float:
    """Returns the seconds that some work might take."""
    warps = sizes.splits * sizes.warps
    units = math.ceil(work.tokens / sizes.unit / warps) * sizes.warps  # of a team
    tiles = math.ceil(work.dense_slots / 16 / warps) * sizes.warps
    token = (work.key_bits + work.value_bits) * work.head_dim / 8 + 4
    token += 4 * work.head_dim / work.group_size
    unit = max(
        sizes.unit * token / BYTES_PER_SECOND,
        (UNIT_SECONDS + sizes.unit * TOKEN_SECONDS) * work.head_dim / 128,
    )
    team = units * unit + tiles * 64 * work.head_dim / BYTES_PER_SECOND
    blocks = math.ceil(work.rows / sizes.teams) * sizes.splits
    waves = math.ceil(blocks / (MULTIPROCESSORS // sizes.cluster * sizes.cluster))
    # One block at a time has a multiprocessor; few warps don't hide what memory takes.
    speed = min(1.0, sizes.warpgroups / 4 + 0.45)
    time = waves * (sizes.teams * team / speed + BLOCK_SECONDS)
    return time + (sizes.splits > sizes.cluster) * MERGE_SECONDS


@functools.cache
def _tuned() -> dict[tuple, BlockSizes]:
    """Returns sizes by the fields of `Work`, from all files of measurements."""
    entries = {}
    for file in sorted(TUNED.glob("*.json")):
        for entry in json.loads(file.read_text())["entries"]:
            entries[dataclasses.astuple(Work(**entry["work"]))] = BlockSizes(**entry["sizes"])
    return entries
