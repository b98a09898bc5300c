# SPDX-License-Identifier: Apache-2.0
"""Outlier tokens: the few tokens of a group that are kept in full precision, and traced."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvq_jax.base import KV, CacheSpec


class PoolState(NamedTuple):
    """What tracing remembers; P = num_outliers, A = num_auxiliary, p = P + A.

    The tokens themselves lie in the first P + A dense slots of the cache: the outlier pool,
    then the auxiliary pool of those that lost their place in it.

    Attributes:
      score: of the tokens in the outlier pool; +inf where it is empty.
      positions: of the tokens in both pools; -1 where they are empty.
      num_auxiliary: tokens in the auxiliary pool.
      tracing: False where groups are (from now on) coded without looking for outliers.
    """

    score: Float[Array, "B K P"]
    positions: Int[Array, "B K p"]
    num_auxiliary: Int[Array, "B K"]
    tracing: Bool[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class OutlierTracer:
    """Keeps the tokens of the smallest score seen so far out of the codes.

    Before a group is coded, its tokens compete with the pool for the `num_outliers` places. A
    winner's key is replaced by the mean key of the group's other tokens, so that it no longer
    stretches the range of a channel, and its slot becomes a hole. A token that loses its
    place can't go back; it moves to the auxiliary pool. A group whose losers don't all fit
    there is coded as it is, and tracing stops for that row and head.

    Args:
      num_outliers: places of the outlier pool of each KV head.
      num_auxiliary: places of the auxiliary pool.
      score: "l1" or "l2", norm of the key over its channels; or "position", which keeps the
        first tokens whatever they are: the control that shows what tracing adds.
      share_heads: sum the score over the KV heads, so that all of them keep the same tokens.
      untraced_layers: layers at the start of the model in which nothing is traced.
    """

    num_outliers: int = 3
    num_auxiliary: int = 32
    score: Literal["l1", "l2", "position"] = "l1"
    share_heads: bool = False
    untraced_layers: int = 2

    def __post_init__(self):
        if self.num_outliers < 1:
            raise ValueError(f"num_outliers must be at least 1, got {self.num_outliers}")
        if self.num_auxiliary < 0:
            raise ValueError(f"num_auxiliary must be at least 0, got {self.num_auxiliary}")
        if self.score not in ("l1", "l2", "position"):
            raise ValueError(f'score must be "l1", "l2" or "position", got {self.score!r}')

    @property
    def num_slots(self) -> int:
        """Dense slots of both pools."""
        return self.num_outliers + self.num_auxiliary

    def init(self, spec: CacheSpec, layer: int | None) -> PoolState:
        """Returns empty pools."""
        heads = (spec.batch_size, spec.num_kv_heads)
        return PoolState(
            score=jnp.full((*heads, self.num_outliers), jnp.inf, jnp.float32),
            positions=jnp.full((*heads, self.num_slots), -1, jnp.int32),
            num_auxiliary=jnp.zeros(heads, jnp.int32),
            tracing=jnp.full(heads, layer is None or layer >= self.untraced_layers),
        )

    def trace(
        self,
        pool: PoolState,
        pool_keys: Float[Array, "B K p H"],
        pool_values: Float[Array, "B K p H"],
        group: KV,
        where: Bool[Array, " B"],
    ) -> tuple[PoolState, Array, Array, KV]:
        """Lets a group that is about to be coded compete for the pool.

        Args:
          pool: the pools.
          pool_keys: keys of the tokens in them.
          pool_values: values of the tokens in them.
          group: the tokens, keys and values `B K S H`, positions `B 1 S`.
          where: rows to which this happens; the others stay as they are.

        Returns:
          pool, pool_keys, pool_values, and the group with the keys of its outliers replaced by
          the mean and their positions by -1.
        """
        num_outliers, num_auxiliary = self.num_outliers, self.num_auxiliary
        positions = jnp.broadcast_to(group.positions, group.keys.shape[:-1])
        candidates = jnp.concatenate([pool.score, self._score(group.keys, positions)], -1)
        _, winners = jax.lax.top_k(-candidates, num_outliers)  # ties go to the pool
        wins = (winners[..., None] == jnp.arange(candidates.shape[-1])).any(-2)
        loses = ~wins[..., :num_outliers] & (pool.positions[..., :num_outliers] >= 0)

        num_losers = loses.sum(-1, dtype=jnp.int32)
        fits = pool.num_auxiliary + num_losers <= num_auxiliary
        traced = where[:, None] & pool.tracing & fits
        outlier = traced[..., None] & wins[..., num_outliers:]

        # Losers go to the auxiliary pool in the order of their slots.
        place = pool.num_auxiliary[..., None] + loses.cumsum(-1, dtype=jnp.int32) - 1
        goes = loses[..., None, :] & (place[..., None, :] == jnp.arange(num_auxiliary)[:, None])
        loser, receives = goes.argmax(-1), goes.any(-1)  # of each auxiliary slot

        def move(pooled: Array, new: Array) -> Array:
            """Fills both pools with winners of `pooled` and `new` (slots on axis 2)."""
            main, auxiliary = pooled[:, :, :num_outliers], pooled[:, :, num_outliers:]
            moved = jnp.concatenate(
                [
                    _take(jnp.concatenate([main, new], 2), winners),
                    jnp.where(_align(receives, main), _take(main, loser), auxiliary),
                ],
                2,
            )
            return jnp.where(_align(traced, pooled), moved, pooled)

        score = jnp.where(traced[..., None], _take(candidates, winners), pool.score)
        pool = PoolState(
            score=score,
            positions=move(pool.positions, positions),
            num_auxiliary=pool.num_auxiliary + jnp.where(traced, num_losers, 0),
            tracing=pool.tracing & (fits | ~where[:, None]),
        )
        rest = group._replace(
            keys=jnp.where(outlier[..., None], _mean(group.keys, ~outlier), group.keys),
            positions=jnp.where(outlier, -1, positions),
        )
        return pool, move(pool_keys, group.keys), move(pool_values, group.values), rest

    def _score(self, keys: Array, positions: Array) -> Float[Array, "B K S"]:
        if self.score == "position":
            return positions.astype(jnp.float32)
        keys = keys.astype(jnp.float32)
        score = jnp.abs(keys).sum(-1) if self.score == "l1" else jnp.square(keys).sum(-1)
        if self.share_heads:
            score = jnp.broadcast_to(score.sum(1, keepdims=True), score.shape)
        return score if self.score == "l1" else jnp.sqrt(score)


def _take(x: Array, index: Array) -> Array:
    """Gathers slots (axis 2) of `B K S ...`."""
    return jnp.take_along_axis(x, _align(index, x), axis=2)


def _align(x: Array, like: Array) -> Array:
    """Adds trailing axes to x until it has as many as `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _mean(keys: Array, mask: Array) -> Array:
    """Returns the mean over the slots chosen by the mask, `B K 1 H`."""
    mask = mask[..., None].astype(jnp.float32)
    total = (keys.astype(jnp.float32) * mask).sum(2, keepdims=True)
    return (total / jnp.maximum(mask.sum(2, keepdims=True), 1)).astype(keys.dtype)
