# SPDX-License-Identifier: Apache-2.0
"""Principal coordinates, of which the leading ones get more bits and the last none."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.affine import Affine, AffineCode
from kvq_jax.codecs.base import Codec, Sample


class LatentCode(NamedTuple):
    """Codes of the bands of latent channels that have bits, the leading one first."""

    bands: tuple[AffineCode, ...]


@dataclasses.dataclass(frozen=True)
class Latent(Codec):
    """Codes tensors in the principal coordinates of what it was fitted to, per latent channel.

    Latent channels in order of falling variance are cut into bands of equal size, each with bits
    of its own. Where heads are joined there are K H of them, and each head stores an equal
    share of every band.

    Args:
      bits: of each band, 0 to 8; 0 keeps only the mean.
      group_size: tokens that share a scale.
      joint: one basis for all KV heads together, instead of one for each.
      fits: "prompt" or "texts".
      params: mean `b J D` and basis `b J D D`, set by `bind`; J = 1 and D = K H where heads are
        joined, J = K and D = H where not.
    """

    bits: tuple[int, ...]
    group_size: int
    joint: bool = True
    fits: Literal["prompt", "texts"] | None = "prompt"
    params: Any = ()

    def __post_init__(self):
        if not any(self.bits):
            raise ValueError(f"some band must have bits, got {self.bits}")
        self._codecs()

    @property
    def shares_heads(self) -> bool:
        """Whether heads are joined; see `Part`."""
        return self.joint

    def init(self, spec: CacheSpec) -> Params:
        """Returns the basis that changes nothing, of prompts; or NaN, of texts."""
        if spec.head_dim % len(self.bits):
            raise ValueError(f"{len(self.bits)} bands do not divide head_dim={spec.head_dim}")
        heads = 1 if self.joint else spec.num_kv_heads
        width = spec.num_kv_heads * spec.head_dim // heads
        if self.fits == "texts":
            shape = (1, heads, width)
            return jnp.full(shape, jnp.nan), jnp.full((*shape, width), jnp.nan)
        shape = (spec.batch_size, heads, width)
        return jnp.zeros(shape), jnp.tile(jnp.eye(width), (*shape[:2], 1, 1))

    def fit(self, sample: Sample) -> Params:
        """Returns mean and principal directions of each row."""
        batch, num_tokens, num_heads, _ = sample.x.shape
        heads = 1 if self.joint else num_heads
        mask = sample.mask[:, :, None, None]
        x = sample.x.astype(jnp.float32).reshape(batch, num_tokens, heads, -1)
        count = jnp.maximum(mask.sum(1, keepdims=True, dtype=jnp.float32), 1)
        mean = jnp.where(mask, x, 0).sum(1, keepdims=True) / count
        x = jnp.where(mask, x - mean, 0)
        covariance = jnp.einsum("btjd,btje->bjde", x, x, precision="highest")
        _, axes = jnp.linalg.eigh(covariance / count[:, 0, :, :, None])
        return mean[:, 0], axes[..., ::-1]

    def bind(self, params: Params) -> "Latent":
        """Returns the codec of this basis."""
        return dataclasses.replace(self, params=params)

    def encode(
        self, x: Float[Array, "B K n S H"], mask: Bool[Array, "B K n S"] | None = None
    ) -> LatentCode:
        """Returns the code of x; see `Codec.encode`. It has no holes."""
        if mask is not None:
            raise ValueError("latent channels can't have holes")
        mean, basis = self.params
        num_heads, head_dim = x.shape[1], x.shape[-1]
        heads = _join(x.astype(jnp.float32), mean.shape[1])
        z = heads.reshape(*heads.shape[:-2], -1)
        z = z - _spread(mean, z)
        z = jnp.einsum("bj...d,bjde->bj...e", z, basis, precision="highest")
        # Every head of those that are joined stores an equal share of each band.
        z = z.reshape(*z.shape[:-1], head_dim, -1).swapaxes(-1, -2)
        z = _part(z, num_heads)
        bands = zip(jnp.split(z, len(self.bits), -1), self._codecs(), strict=True)
        return LatentCode(tuple(codec.encode(band) for band, codec in bands if codec))

    def decode(self, code: LatentCode, dtype: Any) -> Float[Array, "B K *d S H"]:
        """Returns the tensor that a code stands for, computed in float32."""
        codes, bands = iter(code.bands), []
        for codec in self._codecs():
            bands.append(codec.decode(next(codes), jnp.float32) if codec else None)
        kept = next(band for band in bands if band is not None)
        z = jnp.concatenate([jnp.zeros_like(kept) if x is None else x for x in bands], -1)
        mean, basis = self.params
        num_heads, head_dim = z.shape[1], z.shape[-1]
        z = _join(z, mean.shape[1]).swapaxes(-1, -2)
        z = z.reshape(*z.shape[:-2], -1)
        x = jnp.einsum("bj...e,bjde->bj...d", z, basis, precision="highest")
        x = x + _spread(mean, x)
        x = _part(x.reshape(*x.shape[:-1], -1, head_dim), num_heads)
        return x.astype(dtype)

    def mask(self, code: LatentCode) -> Bool[Array, "*d S"]:
        """Raises: there are no holes to be told."""
        raise ValueError("latent channels can't have holes")

    def _codecs(self) -> list[Affine | None]:
        """Returns the codec of each band."""
        tile = self.group_size, 1
        return [Affine(bits, tile) if bits else None for bits in self.bits]


def _join(x: Array, groups: int) -> Array:
    """Reshapes `B K ... H` to `B groups ... share H`."""
    batch, num_heads, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, groups, num_heads // groups, *rest), 2, -2)


def _part(x: Array, num_heads: int) -> Array:
    """Undoes `_join`."""
    x = jnp.moveaxis(x, -2, 2)
    return x.reshape(x.shape[0], num_heads, *x.shape[3:])


def _spread(mean: Array, x: Array) -> Array:
    """Reshapes `b J D` to be subtracted from `B J ... D`."""
    return mean.reshape(*mean.shape[:2], *[1] * (x.ndim - 3), -1)
