# SPDX-License-Identifier: Apache-2.0
"""Quantization of what is left when each token, or each channel, is divided by its size."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvq_jax.base import Code
from kvq_jax.codecs.base import Codec
from kvq_jax.sums import exact_square, ordered_sum


class NormalizedCode(NamedTuple):
    """x ≈ factor * what the inner code stands for.

    Attributes:
      code: of the quotient.
      factor: of each token `... S 1`, or of each channel `... 1 H`; never 0 but in an empty
        segment.
    """

    code: Code
    factor: Float[Array, "*d s h"]


@dataclasses.dataclass(frozen=True)
class Normalized(Codec):
    """Codes x over a factor of each token or channel, by which what is decoded is multiplied.

    The factor evens out what the inner codec's tiles hold: tokens where a tile is a channel of
    many tokens, channels where it is a token of many channels.

    Args:
      codec: of the quotient; it tells the holes.
      axis: "token" or "channel", what each has a factor.
      rounds: 0 takes the root mean square as it is. Else standard deviations of tokens and of
        channels are divided out in turn so many times, which makes both even, and the factor of
        `axis` is what this axis was divided by in all.
      factor_dtype: of what is stored; x is divided by the stored factor.
    """

    codec: Codec
    axis: Literal["token", "channel"]
    rounds: int = 0
    factor_dtype: Any = jnp.float16

    def __post_init__(self):
        if self.axis not in ("token", "channel"):
            raise ValueError(f'axis must be "token" or "channel", got {self.axis!r}')
        if self.rounds < 0:
            raise ValueError(f"rounds must be at least 0, got {self.rounds}")

    def encode(
        self, x: Float[Array, "*d S H"], mask: Bool[Array, "*d S"] | None = None
    ) -> NormalizedCode:
        """Returns the code of x; see `Codec.encode`."""
        x = x.astype(jnp.float32)
        over = -1 if self.axis == "token" else -2
        if self.rounds:
            factor = _balance(x, self.rounds)[over]
        else:
            factor = jnp.sqrt(ordered_sum(exact_square(x), over) / x.shape[over])
        factor = _not_zero(factor.astype(self.factor_dtype))
        return NormalizedCode(self.codec.encode(x / factor.astype(x.dtype), mask), factor)

    def decode(self, code: NormalizedCode, dtype: Any) -> Float[Array, "*d S H"]:
        """Returns the tensor that a code stands for, computed in float32."""
        quotient = self.codec.decode(code.code, jnp.float32)
        return (quotient * code.factor.astype(jnp.float32)).astype(dtype)

    def mask(self, code: NormalizedCode) -> Bool[Array, "*d S"]:
        """Returns False where the inner codec has a hole."""
        return self.codec.mask(code.code)


def _balance(x: Array, rounds: int) -> dict[int, Array]:
    """Returns what tokens and channels of `... S H` are to be divided by, by the axis summed over.

    Divisions, roots and sums in order: the last bits don't depend on how many groups there are.
    """

    def deviation(x: Array, axis: int) -> Array:
        x = x - ordered_sum(x, axis) / x.shape[axis]
        return _not_zero(jnp.sqrt(ordered_sum(exact_square(x), axis) / x.shape[axis]))

    def step(_, factors: tuple[Array, Array]) -> tuple[Array, Array]:
        token, channel = factors
        size = deviation(x / (token * channel), -1)
        # Relative to their mean: what all tokens share is left to the channels. Else one factor
        # would grow with each round as the other shrinks.
        token = token * (size / (ordered_sum(size, -2) / size.shape[-2]))
        channel = channel * deviation(x / (token * channel), -2)
        return token, channel

    ones = jnp.ones_like(x[..., :1]), jnp.ones_like(x[..., :1, :])
    token, channel = jax.lax.fori_loop(0, rounds, step, ones)
    return {-1: token, -2: channel}


def _not_zero(x: Array) -> Array:
    """Replaces zeros, by which nothing can be divided, by ones."""
    return jnp.where(x == 0, jnp.ones_like(x), x)
