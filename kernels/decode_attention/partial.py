# SPDX-License-Identifier: Apache-2.0
"""Attention over some of the tokens, which merges with attention over the others.

A softmax over two sets of tokens is the mean of both outputs, weighted by the sums of their
exponentials. So a window, codes, a prefix shared by several sequences, another device's blocks and
an attention sink are each one more `Partial`.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention of T queries over some tokens.

    Attributes:
      out: the output over these tokens alone, in the dtype of the queries; 0 where a query sees
        none of them.
      lse: logarithm of the sum of exp(score), float32; -inf where a query sees none.
      scores: scaled scores, float32, -inf where a query doesn't see the token: of dense slots
        first, then of coded tokens by position. None unless they were asked for. Weights are
        `exp(scores - lse)`, with the `lse` of all tokens.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]
    scores: Float[Array, "B K G T S"] | None = None


def merge(*parts: Partial) -> Partial:
    """Returns attention over the tokens of all parts together.

    Each token must be in one part only. Scores are not merged.

    Args:
      parts: of the same queries.

    Example:
      >>> import jax.numpy as jnp
      >>> one, other = (jnp.full((1, 1, 1, 4), x) for x in (1.0, 3.0))
      >>> even = jnp.zeros((1, 1, 1))
      >>> merge(Partial(one, even), Partial(other, even)).out[0, 0, 0, 0].item()
      2.0
    """
    top = functools.reduce(jnp.maximum, (part.lse for part in parts))
    top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf would be NaN
    weights = [jnp.exp(part.lse - top) for part in parts]
    total = sum(weights, jnp.zeros_like(top))
    out = sum(
        (
            part.out.astype(jnp.float32) * w[..., None]
            for part, w in zip(parts, weights, strict=True)
        ),
        jnp.zeros((), jnp.float32),
    )
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return Partial(out.astype(parts[0].out.dtype), top + jnp.log(total))


def sink(logits: Float[Array, " N"], like: Partial) -> Partial:
    """Returns an attention sink: weight without a value, that takes part in the softmax.

    Args:
      logits: of each query head, such as the learned ones of gpt-oss.
      like: a partial of the same queries.

    References:
      gpt-oss, arXiv 2508.10925, section 2.2; Xiao et al., StreamingLLM, arXiv 2309.17453,
      section 3.3.

    Example:
      >>> import jax.numpy as jnp
      >>> part = Partial(jnp.ones((1, 1, 2, 4)), jnp.zeros((1, 1, 2)))
      >>> merge(part, sink(jnp.zeros(2), part)).out[0, 0, 0, 0].item()
      0.5
    """
    lse = jnp.broadcast_to(logits.astype(jnp.float32), like.lse.shape)
    return Partial(jnp.zeros_like(like.out), lse)


def soft_capped(scores: Array, soft_cap: float | None) -> Array:
    """Returns scores squashed into -soft_cap ... soft_cap; None leaves them (Gemma 2)."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
