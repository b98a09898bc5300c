# SPDX-License-Identifier: Apache-2.0
"""Uniform quantization of a tile between its minimum and its maximum."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kvq_jax import packing
from kvq_jax.codecs.base import Codec

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


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
class Affine(Codec):
    """Asymmetric round-to-nearest quantization, per channel or per token by its tile.

    Scale and minimum are stored in `scale_dtype`, rounded outward, and fields are computed
    against the stored ones: nothing clips, and the error of every element stays below half a
    (slightly wider) step.

    Args:
      bits: 1 to 8.
      tile: (tokens, channels) that share a scale. (group_size, 1) is KIVI's key, per channel;
        (1, group_size) is its value, per token, where head_dim cuts a larger group_size.
      scale_dtype: float16 keeps the offset of a channel 8 times finer than bfloat16; a tensor
        beyond its range (65504) decodes to NaN.

    References:
      KIVI, arXiv 2402.02750, section 3.
    """

    bits: int
    tile: tuple[int, int]
    scale_dtype: Any = jnp.float16

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")

    def encode(
        self, x: Float[Array, "*d S H"], mask: Bool[Array, "*d S"] | None = None
    ) -> AffineCode:
        """Returns the code of x; see `Codec.encode`. A mask needs tiles of one token."""
        if mask is not None:
            self._check_per_token()
        tiles = self._tiles(x.astype(jnp.float32))
        # XLA:CPU passes over NaN where it reduces a larger array to a minimum or maximum.
        invalid = jnp.isnan(tiles).any((-3, -1), keepdims=True)
        low = jnp.where(invalid, jnp.nan, tiles.min((-3, -1), keepdims=True))
        high = tiles.max((-3, -1), keepdims=True)
        levels = 2**self.bits - 1
        minimum = _round(low, self.scale_dtype, towards=-jnp.inf)
        scale = _round((high - minimum.astype(jnp.float32)) / levels, self.scale_dtype, jnp.inf)
        scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)
        field = jnp.round((tiles - minimum.astype(jnp.float32)) / scale.astype(jnp.float32))
        field = field.clip(0, levels).astype(jnp.uint8).reshape(x.shape)
        scale, minimum = scale.squeeze((-3, -1)), minimum.squeeze((-3, -1))
        if mask is not None:
            scale = jnp.where(mask[..., None], scale, jnp.zeros_like(scale))
            minimum = jnp.where(mask[..., None], minimum, jnp.zeros_like(minimum))
        return AffineCode(packing.pack(field, self.bits), scale, minimum)

    def decode(self, code: AffineCode, dtype: Any) -> Float[Array, "*d S H"]:
        """Returns the tensor that a code stands for, computed in float32."""
        field = packing.unpack(code.words, self.bits)
        scale, minimum = (
            x.astype(jnp.float32)[..., :, None, :, None] for x in (code.scale, code.minimum)
        )
        x = self._tiles(field).astype(jnp.float32) * scale + minimum
        return x.reshape(field.shape).astype(dtype)

    def mask(self, code: AffineCode) -> Bool[Array, "*d S"]:
        """Returns False where a token is a hole; only for tiles of one token."""
        self._check_per_token()
        return (code.scale != 0).any(-1)

    def _check_per_token(self) -> None:
        if self.tile[0] != 1:
            raise ValueError(f"holes are told by scales per token, not by tiles of {self.tile}")

    def _tiles(self, x: Array) -> Array:
        """Reshapes `... S H` to `... S/tokens tokens H/channels channels`."""
        *batch, num_tokens, head_dim = x.shape
        tokens, channels = self.tile[0], min(self.tile[1], head_dim)
        if num_tokens % tokens or head_dim % channels:
            raise ValueError(
                f"a tensor of {num_tokens} tokens and {head_dim} channels can't be cut into "
                f"tiles of {tokens} tokens and {channels} channels"
            )
        return x.reshape(*batch, num_tokens // tokens, tokens, head_dim // channels, channels)


def _round(x: Array, dtype: Any, towards: float) -> Array:
    """Casts float32 to a narrower dtype, rounding towards -inf or +inf."""
    nearest = x.astype(dtype)
    wrong_side = nearest.astype(x.dtype) > x if towards < 0 else nearest.astype(x.dtype) < x
    return jnp.where(wrong_side, jnp.nextafter(nearest, jnp.asarray(towards, dtype)), nearest)
