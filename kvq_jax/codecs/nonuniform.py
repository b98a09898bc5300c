# SPDX-License-Identifier: Apache-2.0
"""Levels fitted to texts, with the few numbers that fit none of them kept apart."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from kvq_jax import packing
from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.base import Codec, Sample
from kvq_jax.codecs.kmeans import kmeans
from kvq_jax.codecs.tiled import BITS
from kvq_jax.sums import ordered_sum

_MOST_POINTS = 1 << 15
"""Numbers that levels are fitted to: many for 256 of them."""


class NonuniformCode(NamedTuple):
    """x ≈ levels[field] * scale + center, plus `extra` where `channel` says.

    Attributes:
      words: the fields, packed along tokens (`kvq_jax.packing`).
      channel: of each of a token's outliers.
      extra: what is to be added there.
      scale: half of the range of each token's other numbers, `... S 1`; 0 only in a hole. () where
        texts say.
      center: the middle of it, likewise.
    """

    words: UInt32[Array, "*d R H"]
    channel: UInt8[Array, "*d S n"]
    extra: Float[Array, "*d S n"]
    scale: Any
    center: Any


@dataclasses.dataclass(frozen=True)
class Nonuniform(Codec):
    """Scales each channel, or each token, to -1 to 1 and takes the nearest of fitted levels.

    One table serves all channels and tokens. Of each head's token the numbers farthest outside are
    outliers, as many as the share says but one at least: their error is stored. A channel's range
    is that of the texts without this share; a token's is its own without the outliers.

    A key that is not finite spreads through the stored errors: without outliers it does not.

    Args:
      bits: 1 to 8.
      per: "channel", whose range texts tell, or "token".
      outliers: share of the numbers kept apart; 0 for none.
      weighs: fit levels with squared gradients as weights.
      keep_deviation: stretch the levels so that the deviation of the numbers, and their mean, are
        those before (Q-Norm).
      iterations: of k-means.
      params: levels `1 2**bits`, and center and scale of each channel `1 K H` or (); set by `bind`.
    """

    bits: int
    per: Literal["channel", "token"]
    outliers: float = 0.01
    weighs: bool = True
    keep_deviation: bool = False
    iterations: int = 50
    params: Any = ()
    fits = "texts"

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if self.per not in ("channel", "token"):
            raise ValueError(f'per must be "channel" or "token", got {self.per!r}')
        if not 0 <= self.outliers < 0.5:
            raise ValueError(f"outliers must be a share from 0 to 0.5, got {self.outliers}")

    def init(self, spec: CacheSpec) -> Params:
        """Returns NaN in the shape of levels and ranges."""
        if spec.head_dim > 256:
            raise ValueError(f"channels of outliers take 8 bits: head_dim={spec.head_dim} > 256")
        levels = jnp.full((1, 2**self.bits), jnp.nan)
        if self.per == "token":
            return levels, (), ()
        channels = (1, spec.num_kv_heads, spec.head_dim)
        return levels, jnp.full(channels, jnp.nan), jnp.full(channels, jnp.nan)

    def fit(self, sample: Sample) -> Params:
        """Returns levels and ranges of a sample of one row without padding."""
        x = sample.x.astype(jnp.float32)
        if self.per == "channel":
            low, high = jnp.quantile(
                x[0], jnp.array([self.outliers / 2, 1 - self.outliers / 2]), axis=0
            )
            center, scale = (high + low) / 2, jnp.maximum((high - low) / 2, 1e-6)
            inside = jnp.abs(x[0] - center) <= scale
        else:
            inside = ~self._outlying(x[0])
            center, scale = _range(x[0], inside)
        unit = jnp.clip((x[0] - center) / scale, -1, 1).reshape(-1)
        weights = inside.astype(jnp.float32)
        if self.weighs and sample.weight is not None:
            weights = weights * sample.weight[0]
        some = jax.random.choice(
            jax.random.key(0), unit.size, (min(unit.size, _MOST_POINTS),), replace=False
        )
        unit, weights = unit[some], weights.reshape(-1)[some]
        found = jax.jit(kmeans, static_argnums=(2, 3))(
            unit[:, None], weights, 2**self.bits, self.iterations
        )
        levels = jnp.sort(found[:, 0])
        if self.keep_deviation:
            coded = levels[_nearest(levels, unit)]
            stretch = unit.std() / coded.std()
            levels = (levels - coded.mean()) * stretch + unit.mean()
        if self.per == "token":
            return levels[None], (), ()
        return levels[None], center[None], scale[None]

    def bind(self, params: Params) -> "Nonuniform":
        """Returns the codec of these levels and ranges."""
        return dataclasses.replace(self, params=params)

    def encode(
        self, x: Float[Array, "B K n S H"], mask: Bool[Array, "B K n S"] | None = None
    ) -> NonuniformCode:
        """Returns the code of x; see `Codec.encode`. A mask needs ranges of tokens."""
        x = x.astype(jnp.float32)
        levels, center, scale = self.params
        if self.per == "token":
            center, scale = (y.astype(jnp.float16) for y in _range(x, ~self._outlying(x)))
            least = jnp.finfo(jnp.float16).smallest_subnormal  # zeros must not look like a hole
            scale = jnp.where(scale == 0, jnp.full_like(scale, least), scale)
            stored = scale, center
            center, scale = center.astype(jnp.float32), scale.astype(jnp.float32)
        else:
            center, scale = _channels(center, x), _channels(scale, x)
            stored = (), ()
        unit = (x - center) / scale
        field = _nearest(levels[0], unit)
        error = x - (levels[0][field] * scale + center)
        # What lies inside its range is no outlier, whatever its error.
        outside = jnp.where(jnp.abs(unit) > 1, jnp.abs(unit), 0)
        size, index = jax.lax.top_k(outside, self._count(x))
        extra = jnp.where(size > 0, jnp.take_along_axis(error, index, -1), 0)
        extra = jnp.where(jnp.isfinite(x).all(-1, keepdims=True), extra, jnp.nan)
        leaves = [extra.astype(jnp.float16), *stored]
        if mask is not None:
            if self.per != "token":
                raise ValueError("holes are told by the ranges of tokens, not of channels")
            leaves = [jnp.where(mask[..., None], leaf, jnp.zeros_like(leaf)) for leaf in leaves]
        words = packing.pack(field.astype(jnp.uint8), self.bits)
        return NonuniformCode(words, index.astype(jnp.uint8), *leaves)

    def decode(self, code: NonuniformCode, dtype: Any) -> Float[Array, "B K *d S H"]:
        """Returns the tensor that a code stands for, computed in float32."""
        levels, center, scale = self.params
        field = packing.unpack(code.words, self.bits)
        x = levels[0].at[field.astype(jnp.int32)].get(mode="clip")
        if self.per == "token":
            x = x * code.scale.astype(jnp.float32) + code.center.astype(jnp.float32)
        else:
            x = x * _channels(scale, x) + _channels(center, x)
        channels = jnp.arange(x.shape[-1], dtype=jnp.uint8)
        for i in range(code.channel.shape[-1]):
            extra = code.extra[..., i : i + 1].astype(jnp.float32)
            x = x + jnp.where(code.channel[..., i : i + 1] == channels, extra, 0)
        return x.astype(dtype)

    def mask(self, code: NonuniformCode) -> Bool[Array, "*d S"]:
        """Returns False where a token is a hole; only for ranges of tokens."""
        if isinstance(code.scale, tuple):
            raise ValueError("holes are told by the ranges of tokens, not of channels")
        return (code.scale != 0)[..., 0]

    def _count(self, x: Array) -> int:
        """Returns the outliers of a head's token."""
        return max(1, math.floor(self.outliers * x.shape[-1] + 0.5)) if self.outliers else 0

    def _outlying(self, x: Array) -> Bool[Array, "*d H"]:
        """Returns which numbers of each token are farthest from its mean."""
        distance = jnp.abs(x - ordered_sum(x, -1) / x.shape[-1])
        _, index = jax.lax.top_k(distance, self._count(x))
        return (index[..., None] == jnp.arange(x.shape[-1])).any(-2)


def _range(x: Array, inside: Array) -> tuple[Array, Array]:
    """Returns middle and half of the range of each token's numbers that count."""
    low = jnp.where(inside, x, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(inside, x, -jnp.inf).max(-1, keepdims=True)
    return (high + low) / 2, jnp.maximum((high - low) / 2, 1e-6)


def _channels(range_: Array, x: Array) -> Array:
    """Reshapes `1 K H` to fit `B K ... H`."""
    return range_.reshape(*range_.shape[:2], *[1] * (x.ndim - 3), -1)


def _nearest(levels: Float[Array, " n"], x: Array) -> Array:
    return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, x)
