# SPDX-License-Identifier: Apache-2.0
"""The definition of decode attention: float32, all scores at once, never optimised."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV


def attention(
    q: Float[Array, "B T N H"],
    kv: KV,
    length: Int[Array, " B"],
    *,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q kᵀ · sm_scale) v over the tokens of `kv` that a query may see.

    Query t of a row stands at position length - T + t. A query that sees no token gives 0.
    """
    batch, num_tokens, _, head_dim = q.shape
    num_kv_heads = kv.keys.shape[1]
    queries = q.astype(jnp.float32).reshape(batch, num_tokens, num_kv_heads, -1, head_dim)
    scores = jnp.einsum(
        "btkgh,bksh->bkgts", queries, kv.keys.astype(jnp.float32), precision="highest"
    )
    at = length[:, None] - num_tokens + jnp.arange(num_tokens)  # [B, T]
    distance = at[:, None, :, None] - kv.positions[:, :, None, :]  # [B, K, T, S]
    visible = (kv.positions >= 0)[:, :, None] & (distance >= 0)
    if sliding_window is not None:
        visible &= distance < sliding_window
    visible = visible[:, :, None]
    scores = jnp.where(visible, scores * sm_scale, -jnp.inf)
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum(
        "bkgts,bksh->btkgh", weights, kv.values.astype(jnp.float32), precision="highest"
    )
    return out.reshape(q.shape).astype(q.dtype)
