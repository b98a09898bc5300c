# SPDX-License-Identifier: Apache-2.0
"""Vector quantization: several channels of a token by one code."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kvq_jax import packing
from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.base import Codec, Sample
from kvq_jax.codecs.kmeans import kmeans
from kvq_jax.sums import exact_square, ordered_sum

_KIND_BITS = 2


class VectorCode(NamedTuple):
    """Which centroid stands for each vector.

    Attributes:
      words: the codes, packed along tokens (`kvq_jax.packing`).
      kind: 2 bits a token, packed likewise, since nothing else would tell: 0 for a hole, 1 for a
        vector, 2 for one that was not finite and is decoded to NaN.
    """

    words: UInt32[Array, "*d R g"]
    kind: UInt32[Array, "*d r 1"]


@dataclasses.dataclass(frozen=True)
class Vector(Codec):
    """Takes the nearest centroid for each group of neighbouring channels of a head's token.

    Each group of each head has centroids of its own, fitted by k-means.

    Args:
      channels: of a group, a divisor of head_dim.
      bits: of a code, 1 to 10.
      weighs: fit with the sum of a vector's squared gradients as its weight.
      iterations: of k-means.
      params: centroids `1 K g 2**bits channels`, float16; set by `bind`.
    """

    channels: int
    bits: int
    weighs: bool = True
    iterations: int = 20
    params: Any = ()
    fits = "texts"

    def __post_init__(self):
        if self.bits not in packing.BITS:
            raise ValueError(f"bits must be one of {packing.BITS}, got {self.bits!r}")
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")

    def init(self, spec: CacheSpec) -> Params:
        """Returns NaN in the shape of centroids."""
        if spec.head_dim % self.channels:
            raise ValueError(f"{self.channels} channels do not divide head_dim={spec.head_dim}")
        groups = spec.head_dim // self.channels
        shape = (1, spec.num_kv_heads, groups, 2**self.bits, self.channels)
        return jnp.full(shape, jnp.nan, jnp.float16)

    def fit(self, sample: Sample) -> Params:
        """Returns the centroids of a sample of one row without padding."""
        points = self._vectors(sample.x[0].astype(jnp.float32))  # [T, K, g, c]
        weights = None
        if self.weighs and sample.weight is not None:
            weights = self._vectors(sample.weight[0]).sum(-1)
        num_tokens, num_heads, groups, _ = points.shape

        def one(case: tuple[Array, Array | None]) -> Array:
            return kmeans(*case, 2**self.bits, self.iterations)

        def flat(x: Array) -> Array:
            return jnp.moveaxis(x, 0, 2).reshape(num_heads * groups, num_tokens, *x.shape[3:])

        case = flat(points), None if weights is None else flat(weights)
        # A CPU's cache holds what one takes; a GPU takes 14 times as long for one after another.
        together = None if jax.default_backend() == "cpu" else 16
        centroids = jax.jit(lambda x: jax.lax.map(one, x, batch_size=together))(case)
        centroids = centroids.reshape(1, num_heads, groups, *centroids.shape[1:])
        return centroids.astype(jnp.float16)

    def bind(self, params: Params) -> "Vector":
        """Returns the codec of these centroids."""
        return dataclasses.replace(self, params=params)

    def encode(
        self, x: Float[Array, "B K n S H"], mask: Bool[Array, "B K n S"] | None = None
    ) -> VectorCode:
        """Returns the code of x; see `Codec.encode`."""
        vectors = jnp.moveaxis(self._vectors(x.astype(jnp.float32)), -2, 0)  # [g, B, K, n, S, c]
        centroids = jnp.moveaxis(self.params.astype(jnp.float32), 2, 0)[:, :, :, None, None]

        def nearest(case: tuple[Array, Array]) -> Array:
            vector, centroid = case  # one group of channels: distances of all are too many
            distance = ordered_sum(exact_square(vector[..., None, :] - centroid), -1)
            return distance[..., 0].argmin(-1)

        code = jnp.moveaxis(jax.lax.map(nearest, (vectors, centroids)), 0, -1)
        code = code.astype(jnp.uint8 if self.bits <= 8 else jnp.uint16)
        kind = jnp.where(jnp.isfinite(x).all(-1, keepdims=True), 1, 2)
        if mask is not None:
            kind = jnp.where(mask[..., None], kind, 0)
        return VectorCode(
            packing.pack(code, self.bits), packing.pack(kind.astype(jnp.uint8), _KIND_BITS)
        )

    def decode(self, code: VectorCode, dtype: Any) -> Float[Array, "B K *d S H"]:
        """Returns the tensor that a code stands for; holes are 0."""
        index = jnp.moveaxis(packing.unpack(code.words, self.bits).astype(jnp.int32), -1, 2)
        flat = index.reshape(*index.shape[:3], -1, 1)  # [B, K, g, tokens, 1]
        vectors = jnp.take_along_axis(self.params, flat, axis=3, mode="clip")
        vectors = jnp.moveaxis(vectors.reshape(*index.shape, -1), 2, -2)
        x = vectors.reshape(*vectors.shape[:-2], -1).astype(dtype)
        kind = packing.unpack(code.kind, _KIND_BITS)
        x = jnp.where(kind == 0, jnp.zeros_like(x), x)
        return jnp.where(kind == 2, jnp.full_like(x, jnp.nan), x)

    def mask(self, code: VectorCode) -> Bool[Array, "*d S"]:
        """Returns False where a token is a hole."""
        return packing.unpack(code.kind, _KIND_BITS)[..., 0] != 0

    def _vectors(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.channels)
