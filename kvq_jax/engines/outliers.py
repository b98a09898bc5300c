# SPDX-License-Identifier: Apache-2.0
"""Outlier tokens: the few tokens of a group that are kept in full precision, and traced."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvq_jax.base import CacheSpec
from kvq_jax.sums import exact_square, ordered_sum


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
        keys: Float[Array, "B K n S H"],
        values: Float[Array, "B K n S H"],
        start: Int[Array, " B"],
        num_groups: Int[Array, " B"],
    ) -> tuple[PoolState, Array, Array, Array, Bool[Array, "B K n S"]]:
        """Lets groups that are about to be coded compete for the pool, one after another.

        The pool after each group holds the smallest of all scores so far, so merging pools is
        associative: n groups take a scan of depth log n over scores and positions, and the tokens
        themselves move once, in the end.

        Args:
          pool: the pools.
          pool_keys: keys of the tokens in them.
          pool_values: values of the tokens in them.
          keys: of the groups' tokens.
          values: likewise.
          start: position of the first of these tokens; the others follow it.
          num_groups: groups of each row that take part, 0 to n; the others change nothing.

        Returns:
          pool, pool_keys, pool_values, the groups' keys with those of outliers replaced by the
          mean of the group's other tokens, and a mask, False for outliers.
        """
        batch, heads, n, size, _ = keys.shape
        positions = start[:, None] + jnp.arange(n * size, dtype=jnp.int32)
        positions = jnp.broadcast_to(positions.reshape(batch, 1, n, size), keys.shape[:-1])
        main, auxiliary = jnp.split(pool.positions, [self.num_outliers], axis=-1)
        scores, held = jax.lax.associative_scan(
            self._merge,
            tuple(
                jnp.concatenate([x[:, :, None], y], 2)
                for x, y in zip(
                    (pool.score, main),
                    self._smallest(self._score(keys, positions), positions),
                    strict=True,
                )
            ),
            axis=2,
        )  # the pool before the first group and after each, [B, K, n + 1, P]
        before, after = held[:, :, :-1], held[:, :, 1:]
        loses = (before >= 0) & ~_among(before, after)

        # Counts only grow: once the losers of a group don't fit, those of no later one do.
        num_losers = loses.sum(-1, dtype=jnp.int32).cumsum(-1, dtype=jnp.int32)
        fits = pool.num_auxiliary[..., None] + num_losers <= self.num_auxiliary
        takes_part = jnp.arange(n) < num_groups[:, None, None]
        traced = pool.tracing[..., None] & fits & takes_part
        mask = ~(traced[..., None] & _among(positions, after))

        # Losers go to the auxiliary pool in the order of groups and their slots.
        loses = (loses & traced[..., None]).reshape(batch, heads, -1)
        place = pool.num_auxiliary[..., None] + loses.cumsum(-1, dtype=jnp.int32) - 1
        slot = jnp.arange(self.num_auxiliary)[:, None]
        goes = loses[..., None, :] & (place[..., None, :] == slot)
        loser = _take(before.reshape(batch, heads, -1), goes.argmax(-1))
        auxiliary = jnp.where(goes.any(-1), loser, auxiliary)

        last = traced.sum(-1)[..., None]
        new = PoolState(
            score=_take(scores, last)[:, :, 0],
            positions=jnp.concatenate([_take(held, last)[:, :, 0], auxiliary], -1),
            num_auxiliary=pool.num_auxiliary + loses.sum(-1, dtype=jnp.int32),
            tracing=pool.tracing & (fits | ~takes_part).all(-1),
        )
        slot = (new.positions[..., None] == pool.positions[..., None, :]).argmax(-1)
        index = new.positions - start[:, None, None]

        def move(pooled: Array, groups: Array) -> Array:
            """Fills both pools from the old ones and the groups."""
            groups = groups.reshape(batch, heads, n * size, -1)
            fresh = _take(groups, index.clip(0, n * size - 1))
            return jnp.where((index >= 0)[..., None], fresh, _take(pooled, slot))

        pool_keys, pool_values = move(pool_keys, keys), move(pool_values, values)
        keys = jnp.where(mask[..., None], keys, _mean(keys, mask))
        return new, pool_keys, pool_values, keys, mask

    def _smallest(self, score: Array, positions: Array) -> tuple[Array, Array]:
        """Returns the P smallest scores, and their positions, over the last axis."""
        missing = [(0, 0)] * (score.ndim - 1) + [(0, max(0, self.num_outliers - score.shape[-1]))]
        score = jnp.pad(score, missing, constant_values=jnp.inf)
        positions = jnp.pad(positions, missing, constant_values=-1)
        score, index = jax.lax.top_k(-score, self.num_outliers)  # the first ones of equal scores
        return -score, jnp.take_along_axis(positions, index, axis=-1)

    def _merge(self, earlier: tuple[Array, Array], later: tuple[Array, Array]):
        """Merges scores and positions of two pools; ties go to the earlier one."""
        both = (jnp.concatenate(x, -1) for x in zip(earlier, later, strict=True))
        return self._smallest(*both)

    def _score(self, keys: Array, positions: Array) -> Float[Array, "B K n S"]:
        if self.score == "position":
            return positions.astype(jnp.float32)
        keys = keys.astype(jnp.float32)
        size = jnp.abs(keys) if self.score == "l1" else exact_square(keys)
        score = ordered_sum(size, -1)[..., 0]
        if self.share_heads:
            score = jnp.broadcast_to(ordered_sum(score, 1), score.shape)
        return score if self.score == "l1" else jnp.sqrt(score)


def first_tokens(number: int) -> OutlierTracer | None:
    """Returns a tracer that keeps the first tokens; None for none of them."""
    return OutlierTracer(number, 0, "position", untraced_layers=0) if number else None


def _among(x: Array, y: Array) -> Array:
    """Returns which elements of x are in y, along the last axes."""
    return (x[..., :, None] == y[..., None, :]).any(-1)


def _take(x: Array, index: Array) -> Array:
    """Gathers slots (axis 2) of `B K S ...`."""
    index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=2)


def _mean(keys: Array, mask: Array) -> Array:
    """Returns the mean over the tokens of a group chosen by the mask, `B K n 1 H`."""
    mask = mask[..., None].astype(jnp.float32)
    total = ordered_sum(keys.astype(jnp.float32) * mask, -2)
    return (total / jnp.maximum(mask.sum(-2, keepdims=True), 1)).astype(keys.dtype)
