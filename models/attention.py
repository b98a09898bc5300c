# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention that keeps its keys and values in any `CacheTransform`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvq_jax.base import CacheTransform
from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.layers import (
    RMSNorm,
    apply_rope,
    linear,
    matmul_precision,
    rope_frequencies,
)

# Queries whose scores are in memory at once. For 2048 tokens on a CPU, 512 took 108 ms, 256 and
# 1024 more, and all at once 242 ms and three times the memory.
_QUERY_BLOCK = 512


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    sliding_window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attends exactly, each query to the tokens up to its own.

    On an NVIDIA GPU, cuDNN does it for 16-bit types and never writes a score to memory. Elsewhere
    blocks of queries skip the keys that none of them sees: half of the work of a long prompt, and
    scores for `_QUERY_BLOCK` queries in memory instead of all.

    Args:
      q: queries, after rope.
      k: keys, after rope.
      v: values.
      sliding_window: see only this many latest tokens, the query's own included.

    Returns:
      The attention output in the dtype of q; the softmax is computed in float32.
    """
    num_tokens = q.shape[1]
    if sliding_window is not None and sliding_window >= num_tokens:
        sliding_window = None
    # jax.nn.dot_product_attention has no precision argument, and mixes bfloat16 with float32
    # inside, which strict promotion forbids.
    with (
        jax.default_matmul_precision(matmul_precision(q.dtype)),
        jax.numpy_dtype_promotion("standard"),
    ):
        if _cudnn_takes(q.dtype, q.shape[-1]):
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                is_causal=True,
                # Of tokens before the query's own and after it.
                local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
                implementation="cudnn",
            )
        blocks = []
        for start in range(0, num_tokens, _QUERY_BLOCK):
            end = min(start + _QUERY_BLOCK, num_tokens)
            first = 0 if sliding_window is None else max(0, start + 1 - sliding_window)
            distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
            mask = distance >= 0
            if sliding_window is not None:
                mask &= distance < sliding_window
            blocks.append(
                jax.nn.dot_product_attention(
                    q[:, start:end], k[:, first:end], v[:, first:end], mask=mask[None, None]
                )
            )
    return jnp.concatenate(blocks, axis=1)


def _cudnn_takes(dtype: jnp.dtype, head_dim: int) -> bool:
    """Returns whether cuDNN's attention runs here on heads of this dtype and width."""
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    generation = jax.devices()[0].compute_capability.split(".")[0]  # AMD's is such as "gfx942"
    if not generation.isdigit() or int(generation) < 8:
        return False
    return head_dim % 8 == 0 and head_dim <= (256 if int(generation) >= 9 else 128)


class Attention(nnx.Module):
    """One layer's attention; keys enter the cache after rope, or before it if it asks for those."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        q_width = config.num_q_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        qkv = {"use_bias": config.qkv_bias, "dtype": dtype, "rngs": rngs}
        self.q_proj = linear(config.width, q_width, **qkv)
        self.k_proj = linear(config.width, kv_width, **qkv)
        self.v_proj = linear(config.width, kv_width, **qkv)
        self.o_proj = linear(q_width, config.width, use_bias=config.o_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps, dtype=dtype)

    def _project(
        self, x: Float[Array, "B T M"], positions: Int[Array, "B T"]
    ) -> tuple[Array, Array, Array]:
        """Returns q `[B, T, N, H]` after rope, k before it and v `[B, T, K, H]`."""
        batch_size, num_tokens, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch_size, num_tokens, -1, self.config.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self._rope(q, positions), k, v

    def _rope(self, x: Float[Array, "B T heads H"], positions: Int[Array, "B T"]) -> Array:
        return apply_rope(x, positions, rope_frequencies(self.config))

    def _merge(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T M"]:
        return self.o_proj(heads.reshape(*heads.shape[:2], -1))

    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        state: Any,
        cache: CacheTransform,
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Appends T tokens to the cache and attends to all it holds.

        Args:
          x: normalized hidden states.
          positions: of the T tokens, for rope.
          state: this layer's cache state.
          cache: the transform the state belongs to.

        Returns:
          The attention output and the new state.
        """
        q, k, v = self._project(x, positions)
        state = cache.append(state, k if cache.pre_rope else self._rope(k, positions), v)
        out = cache.attend(state, q, sliding_window=self.config.sliding_window)
        return self._merge(out), state

    def prefill(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        state: Any,
        cache: CacheTransform,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Attends exactly within the prompt, then hands the prompt to an empty cache.

        Arguments and results as in `__call__`, except:
          lengths: valid tokens of each right-padded row. No mask is made of them: padding comes
            after every valid token, so the causal mask hides it.
        """
        q, k, v = self._project(x, positions)
        turned = self._rope(k, positions)
        out = causal_attention(q, turned, v, sliding_window=self.config.sliding_window)
        k = k if cache.pre_rope else turned
        return self._merge(out), cache.prefill(state, k, v, q=q, lengths=lengths)
