# SPDX-License-Identifier: Apache-2.0
"""A cache of a coded past and a recent window in full precision."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kvq_jax.base import CacheSpec, CodedSegment, Params, RingKV, Shared, check_tokens
from kvq_jax.codecs.base import Codec, Part, Sample
from kvq_jax.codecs.frames import AS_GIVEN, Frame
from kvq_jax.engines.outliers import OutlierTracer, PoolState
from kvq_jax.engines.segments import SegmentedCache, Segments
from kvq_jax.kernels.decode_attention import plain
from kvq_jax.kernels.decode_attention.plain import Layout
from kvq_jax.kernels.decode_attention.tpu import SLOTS, TpuCode

_TOKENS_AT_ONCE = 8192
"""Tokens of all rows and layers that are coded together: enough work for a GPU, little memory."""


class Fitted(NamedTuple):
    """What the parts of a method are fitted to; () for those that fit nothing.

    Attributes:
      key_codec: see `Codec`.
      value_codec: likewise.
      key_frame: see `Frame`.
      value_frame: likewise.
    """

    key_codec: Params = ()
    value_codec: Params = ()
    key_frame: Params = ()
    value_frame: Params = ()


class WindowState(NamedTuple):
    """The state of a `Window`; D = pool slots + W, W = residual_length + group_size.

    For TPUs D is rounded up to whole registers by slots without a token between pools and window.

    Attributes:
      coded: the compressed past.
      keys: dense slots: first the pools, if there are any, then the window as a ring, in which
        the token at position p lies in slot p mod W.
      values: likewise.
      pool: what the tracer remembers; () without one.
      length: tokens of each row.
      fitted: what the parts are fitted to.
      rope: of the model, `B half`, for keys from before rotary embedding.
    """

    coded: CodedSegment
    keys: Float[Array, "B K D H"]
    values: Float[Array, "B K D H"]
    pool: PoolState | tuple[()]
    length: Int[Array, " B"]
    fitted: Fitted = Fitted()
    rope: Array | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class Window(SegmentedCache):
    """Keeps the latest tokens dense and codes the oldest group when their window is full.

    A group is coded before the call's own tokens are written, and no earlier than its room is
    needed. So after `length` tokens exactly

        num_coded = group_size * ceil(max(0, length - W) / group_size)

    of them are coded, W = residual_length + group_size, however they came; and the tokens of
    a call of up to residual_length + 1 are all dense while that call attends to them.

    A frame holds all tokens of the cache, dense or coded: they enter it before all else. What
    parts fit to a prompt they fit by the `prefill` that finds the row empty, and keep.

    Args:
      key_codec: codec of a group's keys.
      value_codec: codec of a group's values, with scales per token.
      group_size: tokens coded at a time.
      residual_length: latest tokens that stay dense at the least.
      key_frame: that keys are kept in.
      value_frame: that values are kept in.
      tracer: which tokens of a group to keep dense; None for none. It sees keys in their frame.
      pre_rope: keys are kept, dense or coded, as they are before rotary embedding, and
        turned whenever they are read. No frame of keys goes with it: queries come after it.
      room: tokens that `make_room` has made room for; a call of no more of them codes nothing.
      layout: of the codes in memory; None takes the best for this machine.
    """

    key_codec: Codec
    value_codec: Codec
    group_size: int
    residual_length: int
    key_frame: Frame = AS_GIVEN
    value_frame: Frame = AS_GIVEN
    tracer: OutlierTracer | None = None
    pre_rope: bool = False
    room: int = 0
    layout: Layout | None = None

    def __post_init__(self):
        if self.residual_length < 0:
            raise ValueError(f"residual_length must be at least 0, got {self.residual_length}")
        if not 0 <= self.room <= self.residual_length + 1:
            raise ValueError(
                f"room for {self.room} tokens at a time needs a residual_length of at least "
                f"{self.room - 1}, got {self.residual_length}"
            )
        if self.layout not in (None, *get_args(Layout)):
            raise ValueError(f"layout must be one of {get_args(Layout)}, got {self.layout!r}")
        if self.pre_rope and self.key_frame != AS_GIVEN:
            raise ValueError("keys before rope can't be kept in a frame")

    def init(self, spec: CacheSpec, layer: int | None = None) -> WindowState:
        """Returns an empty cache; see `CacheTransform.init`."""
        fitted = Fitted(
            *(
                Shared(part.init(spec)) if part.fits == "texts" else part.init(spec)
                for part in (part.of_layer(layer) for part in self._parts)
            )
        )
        rope = ()
        if self.pre_rope:
            if spec.rope is None:
                raise ValueError("this cache turns keys itself: CacheSpec.rope must say how")
            rope = jnp.tile(jnp.asarray(spec.rope, jnp.float32), (spec.batch_size, 1))
        key_codec, value_codec, *_ = self._bind(fitted)
        coded = plain.init(
            spec,
            key_codec,
            value_codec,
            self.group_size,
            num_tokens=max(0, spec.capacity - self._window),
            layout=self.layout,
        )
        num_slots = (self.tracer.num_slots if self.tracer else 0) + self._window
        if isinstance(coded.keys, TpuCode):
            num_slots = _divide(num_slots, SLOTS) * SLOTS
        slots = (spec.batch_size, spec.num_kv_heads, num_slots, spec.head_dim)
        return WindowState(
            coded=coded,
            keys=jnp.zeros(slots, spec.dtype),
            values=jnp.zeros(slots, spec.dtype),
            pool=self.tracer.init(spec, layer) if self.tracer else (),
            length=jnp.zeros(spec.batch_size, jnp.int32),
            fitted=fitted,
            rope=rope,
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
        rope = state.rope if isinstance(state.rope, jax.Array) else None
        if not state.coded.block_table.size:  # the window alone has the capacity
            _, _, key_frame, value_frame = self._bind(state.fitted)
            return Segments(dense, key_frame=key_frame, value_frame=value_frame, rope=rope)
        return Segments(dense, state.coded, *self._bind(state.fitted), rope)

    def exact_calls(self, num_tokens: int) -> list[int]:
        """Cuts where a group is coded, W tokens and whole groups on; see `CacheTransform`."""
        first = min(self._window % self.group_size, num_tokens)
        full, rest = divmod(num_tokens - first, self.group_size)
        return [first] * (first > 0) + [self.group_size] * full + [rest] * (rest > 0)

    @property
    def needs_prompt(self) -> bool:
        """Whether a part fits to the prompt; see `CacheTransform`."""
        return any(part.fits == "prompt" for part in self._parts)

    @property
    def needs_texts(self) -> bool:
        """Whether a part fits to texts; see `CacheTransform`."""
        return any(part.fits == "texts" for part in self._parts)

    @property
    def needs_gradients(self) -> bool:
        """Whether a part that fits to texts wants the gradients of the loss."""
        return any(part.weighs for part in self._parts)

    @property
    def shares_heads(self) -> bool:
        """Whether heads share outliers, or what a part is fitted to."""
        shared = self.tracer is not None and self.tracer.share_heads
        return shared or any(part.shares_heads for part in self._parts)

    def fitted_parts(self) -> list[str]:
        """Returns what of the method is fitted to texts, in words to compare by."""
        return [f"{part}" for part in self._parts if part.fits == "texts"]

    def params(self, state: WindowState) -> tuple[Params, ...]:
        """Returns what the state has from `with_params`."""
        return tuple(x.value if isinstance(x, Shared) else () for x in state.fitted)

    def with_params(self, state: WindowState, params: Params) -> WindowState:
        """Replaces what was fitted to texts; see `CacheTransform.with_params`."""
        if not self.needs_texts:
            return super().with_params(state, params)
        fitted = list(state.fitted)
        for i, part in enumerate(self._parts):
            if part.fits == "texts":
                fitted[i] = _fitting(params[i], fitted[i])
        return state._replace(fitted=Fitted(*fitted))

    def calibrate(self, keys: Sample, values: Sample) -> tuple[Params, ...]:
        """Fits what is to be fitted to texts, for one layer.

        Args:
          keys: keys of this layer, all in one row.
          values: the values that belong to them.

        Returns:
          For each of `Fitted` what `with_params` takes; () for the others.
        """
        samples = (keys, values, keys, values)
        return tuple(
            part.fit(sample) if part.fits == "texts" else ()
            for part, sample in zip(self._parts, samples, strict=True)
        )

    def settle(
        self, fitted: Sequence[tuple[Any, ...]], num_heads: int
    ) -> tuple["Window", Sequence[tuple[Params, ...]]]:
        """Finishes what `calibrate` has begun, when it has seen all layers.

        Args:
          fitted: what `calibrate` made of each layer.
          num_heads: K.

        Returns:
          The method to use, of sizes that were found; and for each layer what `with_params` takes.
        """
        del num_heads
        return self, fitted

    def sizes(self) -> Any:
        """Returns the sizes that `settle` found, as JSON can hold them; None if it finds none."""
        return None

    def with_sizes(self, sizes: Any) -> "Window":
        """Returns the method with the sizes that `settle` found."""
        del sizes
        return self

    @property
    def _parts(self) -> tuple[Codec, Codec, Frame, Frame]:
        """Returns the parts in the order of `Fitted`."""
        return self.key_codec, self.value_codec, self.key_frame, self.value_frame

    def _bind(self, fitted: Fitted) -> tuple[Codec, Codec, Frame, Frame]:
        """Returns the parts as fitted."""
        keys, values, key_frame, value_frame = (
            x.value if isinstance(x, Shared) else x for x in fitted
        )
        return (
            self.key_codec.bind(keys),
            self.value_codec.bind(values),
            self.key_frame.bind(key_frame),
            self.value_frame.bind(value_frame),
        )

    @property
    def _window(self) -> int:
        return self.residual_length + self.group_size

    def _pool_slots(self, state: WindowState) -> int:
        """Returns the slots before the ring: those of the pools, and maybe some unused ones."""
        return state.keys.shape[2] - self._window

    def _dense(self, state: WindowState) -> RingKV:
        """Returns the dense slots and where their tokens are in the sequence."""
        pool = jnp.full((*state.keys.shape[:2], self._pool_slots(state)), -1, jnp.int32)
        if isinstance(state.pool, PoolState):
            pool = jax.lax.dynamic_update_slice_in_dim(pool, state.pool.positions, 0, axis=2)
        return RingKV(state.keys, state.values, pool, state.coded.num_coded)

    def make_room(
        self, states: tuple[WindowState, ...], num_tokens: int
    ) -> tuple[tuple[WindowState, ...], "Window"]:
        """Codes the groups of all layers in one loop; see `CacheTransform.make_room`.

        That needs no new token where a call adds no more than residual_length + 1; longer calls
        make room for themselves, and so do those outside `jax.jit`.
        """
        if num_tokens <= self.room:
            return states, self
        if num_tokens > self.residual_length + 1 or not isinstance(states[0].length, Tracer):
            return states, self
        new = jnp.full_like(states[0].length, num_tokens)
        return self._code(states, new, num_tokens), self.with_room(num_tokens)

    def lacks_room(self, lengths: np.ndarray, num_tokens: int) -> bool:
        """Whether some row's window is full; see `CacheTransform.lacks_room`."""
        coded = _divide(np.maximum(lengths - self._window, 0), self.group_size) * self.group_size
        return bool((lengths + num_tokens - coded > self._window).any())

    def with_room(self, num_tokens: int) -> "Window":
        """Returns the method that codes nothing for a call of T tokens."""
        return dataclasses.replace(self, room=num_tokens)

    def prefill(
        self,
        state: WindowState,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        q: Float[Array, "B T N H"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> WindowState:
        """Fits what is to be fitted, then adds the prompts; see `CacheTransform.prefill`."""
        if self.needs_prompt:
            self._check(state, k, v, lengths)
            state = self._fit(state, k, v, q, lengths)
        return self.extend(state, k, v, lengths)

    def _fit(self, state: WindowState, k, v, q, lengths) -> WindowState:
        """Fits the parts of rows that hold no token yet."""
        num_tokens = k.shape[1]
        lengths = jnp.full_like(state.length, num_tokens) if lengths is None else lengths
        mask = jnp.arange(num_tokens) < lengths[:, None]
        fresh = (state.length == 0) & (lengths > 0)

        def fit(part: Part, x: Array, q: Array | None, old: Params) -> Params:
            def choose(new: Array, old: Array) -> Array:
                return jnp.where(fresh.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            if part.fits != "prompt":
                return old
            return jax.tree.map(choose, part.fit(Sample(x, mask, q)), old)

        old = state.fitted
        state = state._replace(
            fitted=old._replace(
                key_frame=fit(self.key_frame, k, q, old.key_frame),
                value_frame=fit(self.value_frame, v, None, old.value_frame),
            )
        )
        *_, key_frame, value_frame = self._bind(state.fitted)  # what codecs see is in them
        q = None if q is None else key_frame.absorb(q)
        return state._replace(
            fitted=state.fitted._replace(
                key_codec=fit(self.key_codec, key_frame.enter(k), q, old.key_codec),
                value_codec=fit(self.value_codec, value_frame.enter(v), None, old.value_codec),
            )
        )

    def _check(self, state: WindowState, k: Array, v: Array, lengths: Array | None) -> None:
        batch, num_heads, _, head_dim = state.keys.shape
        check_tokens(self, state, k, v, (batch, num_heads, head_dim), state.keys.dtype, lengths)

    def extend(self, state: WindowState, k: Array, v: Array, lengths: Array | None) -> WindowState:
        """Codes what has to make room, then writes; see `SegmentedCache.extend`."""
        self._check(state, k, v, lengths)
        batch, num_heads, num_slots, _ = state.keys.shape
        num_tokens = k.shape[1]
        *_, key_frame, value_frame = self._bind(state.fitted)
        k, v = key_frame.enter(k), value_frame.enter(v)
        new = jnp.full(batch, num_tokens) if lengths is None else lengths
        new = new.astype(jnp.int32)
        if num_tokens > self.room:
            (state,) = self._code((state,), new, num_tokens, k, v)
        # Else XLA, for a single row, computes keys and values inside the scatter, a thread for each
        # number: on a GPU that takes longer than attention.
        k, v = jax.lax.optimization_barrier((k, v))
        # Into the ring goes what is valid and not coded already: no more than the latest W.
        index = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        if num_tokens > self._window:
            index = new[:, None] + jnp.arange(-self._window, 0, dtype=jnp.int32)
            k, v = (_take(x, index) for x in (k, v))
        positions = state.length[:, None] + index
        write = (index >= 0) & (index < new[:, None])
        write &= positions >= state.coded.num_coded[:, None]
        slot = jnp.where(write, self._slot(state, positions), num_slots)  # such a write is dropped
        # Without the barrier XLA fuses the write once with the result and again with what reads
        # it, and so copies the whole ring, in every layer and step.
        keys, values = jax.lax.optimization_barrier(
            tuple(
                ring.at[_every_head(slot, num_heads)].set(x.swapaxes(1, 2), mode="drop")
                for ring, x in ((state.keys, k), (state.values, v))
            )
        )
        return state._replace(keys=keys, values=values, length=state.length + new)

    def _slot(self, state: WindowState, positions: Array) -> Array:
        """Returns the dense slots of tokens."""
        return self._pool_slots(state) + positions % self._window

    def _code(
        self,
        states: tuple[WindowState, ...],
        new: Int[Array, " B"],
        num_tokens: int,
        k: Array | None = None,
        v: Array | None = None,
    ) -> tuple[WindowState, ...]:
        """Codes the oldest groups of each row until its new tokens fit.

        Args:
          states: of one or more layers.
          new: tokens that are to be added to each row.
          num_tokens: the most of them.
          k: keys of the new tokens `B T K H`, of one layer. Where T is at most residual_length + 1
            no group reaches into them, and None will do.
          v: values, likewise.
        """
        if not states[0].coded.block_table.size:  # the window alone has the capacity
            return states

        def missing(state: WindowState) -> Array:
            excess = state.length + new - state.coded.num_coded - self._window
            return _divide(jnp.maximum(excess, 0), self.group_size)

        size = len(new) * self.group_size
        n = min(_divide(num_tokens, self.group_size), max(1, _TOKENS_AT_ONCE // size))
        layers = max(1, _TOKENS_AT_ONCE // (n * size))
        if jax.tree.leaves(states[0].fitted):
            layers = 1  # each is fitted to something else

        def code(i: Array, states: tuple[WindowState, ...]) -> tuple[WindowState, ...]:
            del i
            coded = []
            for some in itertools.batched(states, layers):
                counts = [jnp.minimum(missing(state), n) for state in some]
                coded += self._code_groups(some, counts, n, k, v)
            return tuple(coded)

        # A loop, which in most steps runs not once, and not a conditional: that would copy the
        # cache, or leave writes of nothing outside of it.
        most = jnp.stack([missing(state) for state in states]).max()
        return jax.lax.fori_loop(0, _divide(most, n), code, states)

    def _code_groups(
        self,
        states: tuple[WindowState, ...],
        counts: list[Array],
        n: int,
        k: Array | None,
        v: Array | None,
    ) -> list[WindowState]:
        """Codes the next groups of each row, 0 to n by `counts`, of all layers together."""
        keys, values = _join([self._oldest(state, n, k, v) for state in states])
        pools, mask = (), None
        if self.tracer:
            slots = slice(self.tracer.num_slots)
            pool, pool_keys, pool_values, start = _join(
                [
                    (s.pool, s.keys[:, :, slots], s.values[:, :, slots], s.coded.num_coded)
                    for s in states
                ]
            )
            *pools, keys, mask = self.tracer.trace(
                pool, pool_keys, pool_values, keys, values, start, _join(counts)
            )
        key_codec, value_codec, *_ = self._bind(states[0].fitted)
        codes = key_codec.encode(keys), value_codec.encode(values, mask)
        batch = len(counts[0])
        new = (_rows((codes, pools), i * batch, batch) for i in range(len(states)))
        return [self._put(*x) for x in zip(states, new, counts, strict=True)]

    def _oldest(
        self, state: WindowState, n: int, k: Array | None, v: Array | None
    ) -> tuple[Array, Array]:
        """Returns keys and values `B K n S H` of the next groups of each row to be coded."""
        batch, num_heads, _, head_dim = state.keys.shape
        positions = state.coded.num_coded[:, None]
        positions = positions + jnp.arange(n * self.group_size, dtype=jnp.int32)
        index = positions - state.length[:, None]  # among the new tokens

        def gather(ring: Array, new: Array | None) -> Array:
            tokens = ring[_every_head(self._slot(state, positions), num_heads)]
            if new is not None and new.shape[1] > self.residual_length + 1:
                is_new = (index >= 0)[:, None, :, None]
                tokens = jnp.where(is_new, _take(new, index).swapaxes(1, 2), tokens)
            return tokens.reshape(batch, num_heads, n, self.group_size, head_dim)

        return gather(state.keys, k), gather(state.values, v)

    def _put(self, state: WindowState, new, num_groups: Array) -> WindowState:
        """Writes what coding has made for a state: codes of n groups, and the pools."""
        (keys, values), pools = new
        coded = plain.write_groups(state.coded, keys, values, self.group_size, num_groups)
        if not pools:
            return state._replace(coded=coded)
        pool, *pooled = pools
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(x, new, 0, axis=2)
            for x, new in zip((state.keys, state.values), pooled, strict=True)
        )
        return state._replace(coded=coded, keys=keys, values=values, pool=pool)


def _fitting(params: Params, old: Shared) -> Shared:
    """Returns parameters to share, refusing those of other shapes than the old ones."""
    new, had = (jax.tree.map(lambda x: f"{x.dtype}{x.shape}", p) for p in (params, old.value))
    if new != had:
        raise ValueError(f"parameters {new} do not fit a cache of {had}")
    return Shared(jax.tree.map(jnp.array, params))  # a copy, which may be donated


def _divide(x, y: int):
    """Returns x / y rounded up."""
    return (x + y - 1) // y


def _join(trees):
    """Concatenates pytrees over their rows."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def _rows(tree, start: int, size: int):
    """Returns some rows of a pytree."""
    return jax.tree.map(lambda x: x[start : start + size], tree)


def _every_head(slot: Int[Array, "b s"], num_heads: int) -> tuple[Array, Array, Array]:
    """Returns the index of slots of every head in `B K S H`.

    All indexed axes lead, the heads' too: where they don't, XLA may transpose the whole operand
    for a GPU's gather or scatter.
    """
    row, head = (jnp.arange(n, dtype=jnp.int32) for n in (slot.shape[0], num_heads))
    return row[:, None, None], head[:, None], slot[:, None]


def _take(x: Array, index: Array) -> Array:
    """Gathers tokens of `B T K H`; an index out of range gives any."""
    return jnp.take_along_axis(x, index[..., None, None], axis=1, mode="clip")
