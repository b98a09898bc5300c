# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; filters apply in the order of the fields.

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep this many most likely tokens.
      top_p: keep the smallest set of most likely tokens that has this much probability.
      min_p: keep tokens of at least this share of the most likely one's probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be 0 to 1, got {self.min_p}")


def sample(logits: Float[Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, " B"]:
    """Draws a token for each row; rows draw independently.

    Args:
      logits: float32.
      sampling: how; static under `jax.jit`.
      key: of this step.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        top, _ = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
        logits = jnp.where(logits >= top[:, -1:], logits, -jnp.inf)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, -1, descending=True)
        probability = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(probability, -1) - probability  # of all that are more likely
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.min_p:
        least = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, -1).astype(jnp.int32)
