# SPDX-License-Identifier: Apache-2.0
"""OTT, Outlier Tokens Tracing: KIVI without the tokens that spoil a channel's range.

Idea: in the channels where keys are large and alike, a few tokens have keys near zero; they
stretch the range of the whole group. The same tokens have a small norm over all channels. They
are traced while decoding and kept in full precision in a pool of fixed size.

Reference: Su et al., ACL 2025, arXiv 2505.10938.

Parts: KIVI's codecs and window, and an `OutlierTracer`.

Differs from the paper, or fills its silences: the score is the L1 norm of the key after rotary
embedding, per KV head; the slot that an outlier leaves behind gets no weight in the softmax;
prompts are traced group by group, so that the state depends on the tokens only; when the
auxiliary pool can't take all that a group evicts, that group is coded untraced and tracing
stops for its row and head.

Bytes of a state of one KV head and row: KIVI's, and the pools of P = num_outliers and A = 32
tokens: 2 (P + A) H d + 4 P + 4 (P + A) + 5 (scores, positions, count and flag).
"""

from typing import Literal

from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window
from kvq_jax.methods.kivi import kivi


def ott(
    *,
    bits: int = 2,
    value_bits: int | None = None,
    group_size: int = 128,
    value_group_size: int | None = None,
    residual_length: int = 32,
    num_outliers: int = 3,
    num_auxiliary: int = 32,
    score: Literal["l1", "l2"] = "l1",
    share_heads: bool = False,
    untraced_layers: int = 2,
) -> Window:
    """Returns OTT with the paper's settings.

    Example:
      >>> import jax.numpy as jnp, kvq_jax as kvq
      >>> method = kvq.ott(bits=2, group_size=32)
      >>> state = method.init(kvq.CacheSpec(1, 2, 512, 64, jnp.float32))
      >>> k = v = jnp.ones((1, 100, 2, 64))
      >>> state = method.append(state, k, v)
      >>> method.attend(state, jnp.ones((1, 1, 4, 64))).shape
      (1, 1, 4, 64)

    Args:
      bits: as in `kivi`.
      value_bits: as in `kivi`.
      group_size: as in `kivi`.
      value_group_size: as in `kivi`.
      residual_length: as in `kivi`.
      num_outliers: tokens of each KV head kept in full precision; 0 for none, which is KIVI.
      num_auxiliary: room for tokens that later ones push out of those.
      score: norm of the key by which the smallest are found.
      share_heads: let all KV heads of a layer keep the same tokens.
      untraced_layers: first layers, which show no such tokens and are coded without tracing.
    """
    tracer = None
    if num_outliers:
        tracer = OutlierTracer(num_outliers, num_auxiliary, score, share_heads, untraced_layers)
    return kivi(
        bits=bits,
        value_bits=value_bits,
        group_size=group_size,
        value_group_size=value_group_size,
        residual_length=residual_length,
        tracer=tracer,
    )
