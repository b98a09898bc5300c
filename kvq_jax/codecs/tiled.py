# SPDX-License-Identifier: Apache-2.0
"""What all codecs share whose tiles of tokens and channels each have a scale."""

import dataclasses
import sys
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvq_jax.base import Code
from kvq_jax.codecs.base import Codec

BITS = (1, 2, 3, 4, 5, 6, 7, 8)

WHOLE_HEAD = sys.maxsize
"""As channels of a tile: all of a head."""


@dataclasses.dataclass(frozen=True)
class Tiled(Codec):
    """A codec with scales for tiles; its code has a field `scale`, 0 only in a hole.

    Args:
      bits: 1 to 8.
      tile: (tokens, channels) that share a scale. (group_size, 1) is KIVI's key, per channel;
        (1, group_size) is its value, per token, where head_dim cuts a larger group_size.
      scale_dtype: float16 keeps the offset of a channel 8 times finer than bfloat16; a tensor
        beyond its range (65504) decodes to NaN.
    """

    bits: int
    tile: tuple[int, int]
    scale_dtype: Any = jnp.float16

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")

    def mask(self, code: Code) -> Bool[Array, "*d S"]:
        """Returns False where a token is a hole; only for tiles of one token."""
        self._check_per_token()
        return (code.scale != 0).any(-1)

    def _check_per_token(self) -> None:
        if self.tile[0] != 1:
            raise ValueError(f"holes are told by scales per token, not by tiles of {self.tile}")

    def _holes(self, x: Array, mask: Array | None) -> Array:
        """Returns scales `... S h` with zeros for the tokens that are to be holes."""
        if mask is None:
            return x
        self._check_per_token()
        return jnp.where(mask[..., None], x, jnp.zeros_like(x))

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


def spread(scale: Array) -> Array:
    """Returns scales `... s h` in float32, shaped for tiles `... s tokens h channels`."""
    return scale.astype(jnp.float32)[..., :, None, :, None]


def rounded(x: Array, dtype: Any, towards: float) -> Array:
    """Casts float32 to a narrower dtype, rounding towards -inf or +inf."""
    nearest = x.astype(dtype)
    wrong_side = nearest.astype(x.dtype) > x if towards < 0 else nearest.astype(x.dtype) < x
    return jnp.where(wrong_side, jnp.nextafter(nearest, jnp.asarray(towards, dtype)), nearest)
