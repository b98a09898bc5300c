# SPDX-License-Identifier: Apache-2.0
"""A cache of a coded past and a recent window in full precision."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvq_jax.base import KV, CacheSpec, CodedSegment, check_tokens
from kvq_jax.codecs.base import Codec
from kvq_jax.engines.outliers import OutlierTracer, PoolState
from kvq_jax.engines.segments import SegmentedCache, Segments
from kvq_jax.kernels.decode_attention import plain


class WindowState(NamedTuple):
    """The state of a `Window`; D = pool slots + W, W = residual_length + group_size.

    Attributes:
      coded: the compressed past.
      keys: dense slots: first the pools, if there are any, then the window as a ring, in which
        the token at position p lies in slot p mod W.
      values: likewise.
      pool: what the tracer remembers; () without one.
      length: tokens of each row.
    """

    coded: CodedSegment
    keys: Float[Array, "B K D H"]
    values: Float[Array, "B K D H"]
    pool: PoolState | tuple[()]
    length: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Window(SegmentedCache):
    """Keeps the latest tokens dense and codes the oldest group when their window is full.

    A group is coded before the call's own tokens are written, and no earlier than its room is
    needed. So after `length` tokens exactly

        num_coded = group_size * ceil(max(0, length - W) / group_size)

    of them are coded, W = residual_length + group_size, however they came; and the tokens of
    a call of up to residual_length + 1 are all dense while that call attends to them.

    Args:
      key_codec: codec of a group's keys.
      value_codec: codec of a group's values, with scales per token.
      group_size: tokens coded at a time.
      residual_length: latest tokens that stay dense at the least.
      tracer: which tokens of a group to keep dense; None for none.
    """

    key_codec: Codec
    value_codec: Codec
    group_size: int
    residual_length: int
    tracer: OutlierTracer | None = None

    def __post_init__(self):
        if self.residual_length < 0:
            raise ValueError(f"residual_length must be at least 0, got {self.residual_length}")

    def init(self, spec: CacheSpec, layer: int | None = None) -> WindowState:
        """Returns an empty cache; see `CacheTransform.init`."""
        slots = (spec.batch_size, spec.num_kv_heads, self._pool_slots + self._window, spec.head_dim)
        return WindowState(
            coded=plain.init(
                spec,
                self.key_codec,
                self.value_codec,
                self.group_size,
                num_tokens=max(0, spec.capacity - self._window),
            ),
            keys=jnp.zeros(slots, spec.dtype),
            values=jnp.zeros(slots, spec.dtype),
            pool=self.tracer.init(spec, layer) if self.tracer else (),
            length=jnp.zeros(spec.batch_size, jnp.int32),
        )

    def capacity(self, state: WindowState) -> int:
        """Returns the tokens a row can hold: whole blocks of codes and the window."""
        coded = state.coded
        if not coded.block_table.size:
            return self._window
        size = plain.block_size(coded, self.group_size)
        return coded.block_table.shape[1] * size + self._window

    def segments(self, state: WindowState) -> Segments:
        """Returns the codes, and the pools and the window; see `SegmentedCache`."""
        dense = self._dense(state)
        if not state.coded.block_table.size:  # the window alone has the capacity
            return Segments(dense)
        return Segments(dense, state.coded, self.key_codec, self.value_codec)

    def exact_calls(self, num_tokens: int) -> list[int]:
        """Cuts where a group is coded, W tokens and whole groups on; see `CacheTransform`."""
        first = min(self._window % self.group_size, num_tokens)
        full, rest = divmod(num_tokens - first, self.group_size)
        return [first] * (first > 0) + [self.group_size] * full + [rest] * (rest > 0)

    @property
    def _window(self) -> int:
        return self.residual_length + self.group_size

    @property
    def _pool_slots(self) -> int:
        return self.tracer.num_slots if self.tracer else 0

    def _dense(self, state: WindowState) -> KV:
        """Returns the dense slots with the positions of what they hold."""
        last = state.length[:, None] - 1
        slot = jnp.arange(self._window, dtype=jnp.int32)
        positions = last - (last - slot) % self._window  # the latest one of that slot
        positions = jnp.where(positions >= state.coded.num_coded[:, None], positions, -1)
        positions = positions[:, None]
        if isinstance(state.pool, PoolState):
            heads = state.pool.positions.shape[:2]
            positions = jnp.broadcast_to(positions, (*heads, self._window))
            positions = jnp.concatenate([state.pool.positions, positions], -1)
        return KV(state.keys, state.values, positions)

    def extend(self, state: WindowState, k: Array, v: Array, lengths: Array | None) -> WindowState:
        """Codes what has to make room, then writes; see `SegmentedCache.extend`."""
        batch, num_heads, _, head_dim = state.keys.shape
        shape = (batch, num_heads, head_dim)
        check_tokens(self, state, k, v, shape, state.keys.dtype, lengths)
        k, v = (x.swapaxes(1, 2) for x in (k, v))
        num_tokens = k.shape[2]
        new = jnp.full(batch, num_tokens) if lengths is None else lengths
        new = new.astype(jnp.int32)
        length = state.length + new
        excess = jnp.maximum(length - state.coded.num_coded - self._window, 0)
        num_groups = (excess + self.group_size - 1) // self.group_size
        if num_tokens <= self.group_size:  # then no row needs more than one
            state = self._code_group(state, k, v, num_groups > 0)
        else:
            state = jax.lax.fori_loop(
                0,
                num_groups.max(),
                lambda i, state: self._code_group(state, k, v, i < num_groups),
                state,
            )
        # Into the ring goes what is valid and not coded already.
        index = jnp.arange(num_tokens, dtype=jnp.int32)
        positions = state.length[:, None] + index
        write = (index < new[:, None]) & (positions >= state.coded.num_coded[:, None])
        slot = self._pool_slots + positions % self._window
        slot = jnp.where(write, slot, state.keys.shape[2])  # such a write is dropped
        row = jnp.arange(batch)[:, None]
        keys, values = (
            ring.at[row, :, slot].set(x.swapaxes(1, 2), mode="drop")
            for ring, x in ((state.keys, k), (state.values, v))
        )
        # Without the barrier XLA fuses the write once with the result and again with what reads
        # it, and so copies the whole ring, in every layer and step.
        keys, values = jax.lax.optimization_barrier((keys, values))
        return state._replace(keys=keys, values=values, length=length)

    def _code_group(
        self, state: WindowState, k: Array, v: Array, where: Bool[Array, " B"]
    ) -> WindowState:
        """Codes the oldest group of the chosen rows, from the window or the new tokens."""
        positions = state.coded.num_coded[:, None] + jnp.arange(self.group_size, dtype=jnp.int32)
        slot = self._pool_slots + positions % self._window
        index = (positions - state.length[:, None]).clip(0, k.shape[2] - 1)
        old = (positions < state.length[:, None])[:, None, :, None]

        def gather(ring: Array, new: Array) -> Array:
            old_tokens = jnp.take_along_axis(ring, slot[:, None, :, None], axis=2)
            new_tokens = jnp.take_along_axis(new, index[:, None, :, None], axis=2)
            return jnp.where(old, old_tokens, new_tokens)

        def encode(pool_keys: Array, pool_values: Array):
            keys, values = gather(state.keys, k), gather(state.values, v)
            group, pool, mask = KV(keys, values, positions[:, None]), state.pool, None
            if self.tracer and isinstance(pool, PoolState):
                pool, pool_keys, pool_values, group = self.tracer.trace(
                    pool, pool_keys, pool_values, group, where
                )
                mask = group.mask
            key_code = self.key_codec.encode(group.keys)
            value_code = self.value_codec.encode(values, mask)
            return key_code, value_code, pool, pool_keys, pool_values

        def pass_by(pool_keys: Array, pool_values: Array):
            return *blank, state.pool, pool_keys, pool_values

        # Only small arrays come out of the conditional: the codes are written outside of it,
        # in place, where a conditional would copy the cache.
        pool_keys, pool_values = (x[:, :, : self._pool_slots] for x in (state.keys, state.values))
        shapes = jax.eval_shape(encode, pool_keys, pool_values)[:2]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        key_code, value_code, pool, pool_keys, pool_values = jax.lax.cond(
            where.any(), encode, pass_by, pool_keys, pool_values
        )
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(x, pooled, 0, axis=2)
            for x, pooled in ((state.keys, pool_keys), (state.values, pool_values))
        )
        # The next write to the ring has to wait for the reads above, or they get a copy of it.
        keys, values, key_code = jax.lax.optimization_barrier((keys, values, key_code))
        coded = plain.write_group(state.coded, key_code, value_code, self.group_size, where)
        return state._replace(coded=coded, keys=keys, values=values, pool=pool)
