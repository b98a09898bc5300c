# SPDX-License-Identifier: Apache-2.0
"""Affine codes whose error in some channels is made up for in the next."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.affine import Affine, AffineCode
from kvq_jax.codecs.base import Sample


@dataclasses.dataclass(frozen=True)
class Feedback(Affine):
    """Codes channels in blocks, each block with the error of those before it taken off.

    The error of a whole token is weighed by I + weight * Q, where Q is the mean square of the
    prompt's queries within their `rank` leading directions: what queries see
    of the error counts so much more than what they don't. Given the error of the first
    channels, the best of the rest is linear in it (block-wise GPTQ). A row without queries has
    no feedback, and the codes of `Affine`.

    Args:
      channel_block: channels coded at a time, cut to half of head_dim.
      rank: leading directions of the queries.
      weight: of what queries see.
      params: `B K H H`, what each channel adds to the later ones for its error; set by `bind`.

    References:
      SQuat, arXiv 2503.24358; GPTQ, arXiv 2210.17323.
    """

    channel_block: int = 64
    rank: int = 32
    weight: float = 1.0
    params: Any = ()
    fits = "prompt"

    def init(self, spec: CacheSpec) -> Params:
        """Returns no feedback."""
        shape = (spec.batch_size, spec.num_kv_heads, spec.head_dim, spec.head_dim)
        return jnp.zeros(shape, jnp.float32)

    def fit(self, sample: Sample) -> Params:
        """Returns the feedback that the queries of each row and head ask for."""
        batch, num_tokens, num_heads, head_dim = sample.x.shape
        if sample.q is None:
            return jnp.zeros((batch, num_heads, head_dim, head_dim), jnp.float32)
        q = sample.q.reshape(batch, num_tokens, num_heads, -1, head_dim)
        q = jnp.where(sample.mask[..., None, None, None], q.astype(jnp.float32), 0)
        square = jnp.einsum("btkgi,btkgj->bkij", q, q, precision="highest")
        count = sample.mask.sum(1, dtype=jnp.float32) * q.shape[3]
        size, axes = jnp.linalg.eigh(square / jnp.maximum(count, 1)[:, None, None, None])
        size = jnp.where(jnp.arange(head_dim) >= head_dim - self.rank, size, 0)[..., None, :]
        weights = jnp.einsum("bkir,bkjr->bkij", axes * size, axes, precision="highest")
        weights = jnp.eye(head_dim) + self.weight * weights
        rows = []
        for start, end in self._blocks(head_dim):
            # Least error of the rest: its gradient, A[rest, rest] x + A[rest, block] e, is 0.
            rest = weights[..., end:, end:]
            answer = jnp.linalg.solve(rest, weights[..., end:, start:end])
            rows.append(jnp.pad(-answer.swapaxes(-1, -2), [(0, 0)] * 3 + [(end, 0)]))
        return jnp.concatenate(rows, -2)

    def bind(self, params: Params) -> "Feedback":
        """Returns the codec with this feedback."""
        return dataclasses.replace(self, params=params)

    def encode(
        self, x: Float[Array, "B K n S H"], mask: Bool[Array, "B K n S"] | None = None
    ) -> AffineCode:
        """Returns the code of x; see `Codec.encode`."""
        x, parts = x.astype(jnp.float32), []
        for start, end in self._blocks(x.shape[-1]):
            block = x[..., start:end]
            parts.append(super().encode(block, mask))
            error = self.decode(parts[-1], jnp.float32) - block
            answer = jnp.einsum(
                "bknsi,bkij->bknsj", error, self.params[..., start:end, :], precision="highest"
            )
            x = x + answer
        return AffineCode(*(jnp.concatenate(leaves, -1) for leaves in zip(*parts, strict=True)))

    def _blocks(self, head_dim: int) -> list[tuple[int, int]]:
        """Returns where the blocks of channels start and end."""
        edges = np.arange(0, head_dim, min(self.channel_block, head_dim // 2)).tolist()
        return list(zip(edges, [*edges[1:], head_dim], strict=True))
