# SPDX-License-Identifier: Apache-2.0
"""Uniform quantization of a tile between its minimum and its maximum."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kvq_jax import packing
from kvq_jax.codecs.base import Form
from kvq_jax.codecs.tiled import Tiled, rounded, spread


class AffineCode(NamedTuple):
    """x ≈ field * scale + minimum, with one scale and minimum for each tile.

    Attributes:
      words: the fields, packed along tokens (`kvq_jax.packing`).
      scale: step of the tile; its shape says how the tensor was tiled. Never 0 but in a hole.
      minimum: value of field 0.
    """

    words: UInt32[Array, "*d R H"]
    scale: Float[Array, "*d s h"]
    minimum: Float[Array, "*d s h"]


@dataclasses.dataclass(frozen=True)
class Affine(Tiled):
    """Asymmetric round-to-nearest quantization, per channel or per token by its tile.

    Scale and minimum are stored in `scale_dtype`, rounded outward, and fields are computed
    against the stored ones: nothing clips, and the error of every element stays below half a
    (slightly wider) step.

    References:
      KIVI, arXiv 2402.02750, section 3.
    """

    def encode(
        self, x: Float[Array, "*d S H"], mask: Bool[Array, "*d S"] | None = None
    ) -> AffineCode:
        """Returns the code of x; see `Codec.encode`. A mask needs tiles of one token."""
        tiles = self._tiles(x.astype(jnp.float32))
        # XLA:CPU passes over NaN where it reduces a larger array to a minimum or maximum.
        invalid = jnp.isnan(tiles).any((-3, -1), keepdims=True)
        low = jnp.where(invalid, jnp.nan, tiles.min((-3, -1), keepdims=True))
        high = tiles.max((-3, -1), keepdims=True)
        levels = 2**self.bits - 1
        minimum = rounded(low, self.scale_dtype, towards=-jnp.inf)
        scale = rounded((high - minimum.astype(jnp.float32)) / levels, self.scale_dtype, jnp.inf)
        scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
        field = jnp.round((tiles - minimum.astype(jnp.float32)) / scale.astype(jnp.float32))
        field = field.clip(0, levels).astype(jnp.uint8).reshape(x.shape)
        scale, minimum = (self._holes(x.squeeze((-3, -1)), mask) for x in (scale, minimum))
        return AffineCode(packing.pack(field, self.bits), scale, minimum)

    def decode(self, code: AffineCode, dtype: Any) -> Float[Array, "*d S H"]:
        """Returns the tensor that a code stands for, computed in float32."""
        field = packing.unpack(code.words, self.bits)
        x = self._tiles(field).astype(jnp.float32) * spread(code.scale) + spread(code.minimum)
        return x.reshape(field.shape).astype(dtype)

    def form(self, num_channels: int) -> Form:
        """Returns one band, with scales by tile; see `Codec.form`."""
        tile = self.tile[0], min(self.tile[1], num_channels)
        return Form(((num_channels, self.bits),), tile, jnp.dtype(self.scale_dtype))
