# SPDX-License-Identifier: Apache-2.0
"""Quantization of a tile to the levels of a table, times a scale."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kvq_jax import packing
from kvq_jax.codecs.levels import Levels
from kvq_jax.codecs.tiled import Tiled, rounded, spread
from kvq_jax.sums import exact_square, ordered_sum


class TableCode(NamedTuple):
    """x ≈ levels[field] * scale, with one scale for each tile.

    Attributes:
      words: the fields, packed along tokens (`kvq_jax.packing`).
      scale: size of the tile. Never 0 but in a hole.
    """

    words: UInt32[Array, "*d R H"]
    scale: Float[Array, "*d s h"]


@dataclasses.dataclass(frozen=True)
class Table(Tiled):
    """Takes the nearest level of each number over the size of its tile.

    Args:
      levels: ascending, no more than 2**bits (`kvq_jax.codecs.levels`).
      size: of a tile, which becomes its scale: "max", the largest magnitude, rounded outward so
        that levels from -1 to 1 clip nothing; or "rms", the root mean square.
    """

    levels: Levels = dataclasses.field(kw_only=True)
    size: Literal["max", "rms"] = "max"

    def __post_init__(self):
        super().__post_init__()
        if len(self.levels) > 2**self.bits or list(self.levels) != sorted(self.levels):
            raise ValueError(f"levels must ascend and be at most {2**self.bits}: {self.levels}")
        if self.size not in ("max", "rms"):
            raise ValueError(f'size must be "max" or "rms", got {self.size!r}')

    def encode(
        self, x: Float[Array, "*d S H"], mask: Bool[Array, "*d S"] | None = None
    ) -> TableCode:
        """Returns the code of x; see `Codec.encode`. A mask needs tiles of one token."""
        tiles = self._tiles(x.astype(jnp.float32))
        scale = self._size(tiles)
        # A tile of zeros must not look like a hole; of the smallest scale its levels are as good
        # as zero where none of them is.
        least = jnp.finfo(self.scale_dtype).smallest_subnormal
        scale = jnp.where(scale == 0, jnp.full_like(scale, least), scale)
        levels = jnp.asarray(self.levels, jnp.float32)
        edges = (levels[1:] + levels[:-1]) / 2
        field = jnp.searchsorted(edges, tiles / scale.astype(jnp.float32))
        field = field.astype(jnp.uint8).reshape(x.shape)
        scale = self._holes(scale.squeeze((-3, -1)), mask)
        return TableCode(packing.pack(field, self.bits), scale)

    def decode(self, code: TableCode, dtype: Any) -> Float[Array, "*d S H"]:
        """Returns the tensor that a code stands for, computed in float32."""
        field = packing.unpack(code.words, self.bits)
        levels = jnp.asarray(self.levels, jnp.float32)
        level = levels.at[field.astype(jnp.int32)].get(mode="clip")
        x = self._tiles(level) * spread(code.scale)
        return x.reshape(field.shape).astype(dtype)

    def _size(self, tiles: Array) -> Array:
        if self.size == "max":
            # XLA:CPU passes over NaN where it reduces a larger array to a maximum.
            invalid = jnp.isnan(tiles).any((-3, -1), keepdims=True)
            size = jnp.abs(tiles).max((-3, -1), keepdims=True)
            size = jnp.where(invalid, jnp.nan, size)
            return rounded(size, self.scale_dtype, jnp.inf)
        total = ordered_sum(ordered_sum(exact_square(tiles), -1), -3)
        return jnp.sqrt(total / (tiles.shape[-3] * tiles.shape[-1])).astype(self.scale_dtype)
