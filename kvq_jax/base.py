# SPDX-License-Identifier: Apache-2.0
"""The nouns of the library: shapes, state, and the five functions of a method.

Dimension key, the same everywhere (the letters of `jax.nn.dot_product_attention`):

    B  batch row            N  query heads                  L  layers
    T  tokens in this call  K  key/value heads              M  model width
    S  slots of the cache   G  query heads per KV head, N/K V  vocabulary
                            H  head_dim

Model-facing arrays are `B T K H`; stored arrays are `B K S H`, a head's tokens together.
`capacity` counts slots, `length` counts valid tokens.
"""

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

Params = Any
"""A pytree of what a part of a method is fitted to; leading axis B, or 1 in a `Shared`."""

State = Any
"""One layer's cache: a NamedTuple pytree with a field `length: int32[B]`."""

Code = Any
"""A pytree that stands for a tensor; made and read by a `Codec`."""

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "xla", "reference"]
"""Of `kvq_jax.decode_attention`."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """What the attention of one layer is: a model states it, caches and kernels read it.

    Args:
      num_q_heads: N.
      num_kv_heads: K, a divisor of N; query head n attends to KV head n // (N // K).
      key_dim: H of queries and keys.
      value_dim: H of values; 0 means `key_dim`.
      sm_scale: factor of the scores; 0 means 1/sqrt(key_dim).
      sliding_window: how many latest tokens a query sees, its own included; None means all.
      soft_cap: scores are squashed to soft_cap * tanh(score / soft_cap), as in Gemma 2; None
        leaves them.
      rope: radians per token of each of the H/2 pairs of channels; for caches that store keys
        from before rotary embedding and rotate them when they are read. None without rotary
        embedding.
      values_in_keys: values are the first `value_dim` channels of the keys, and are not stored
        (latent attention, MLA).

    Example:
      >>> Attention(num_q_heads=32, num_kv_heads=8, key_dim=128).sm_scale
      0.08838834764831845
    """

    num_q_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int = 0
    sm_scale: float = 0.0
    sliding_window: int | None = None
    soft_cap: float | None = None
    rope: tuple[float, ...] | None = None
    values_in_keys: bool = False

    def __post_init__(self):
        if self.value_dim == 0:
            object.__setattr__(self, "value_dim", self.key_dim)
        if self.sm_scale == 0:
            object.__setattr__(self, "sm_scale", self.key_dim**-0.5)
        for name in ("num_q_heads", "num_kv_heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Attention: {name} must be a positive integer, got {value!r}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"Attention: num_q_heads={self.num_q_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"Attention: sliding_window must be at least 1, got {self.sliding_window}"
            )
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"Attention: soft_cap must be above 0, got {self.soft_cap}")
        if self.rope is not None and 2 * len(self.rope) != self.key_dim:
            raise ValueError(
                f"Attention: rope must have key_dim / 2 = {self.key_dim / 2} frequencies, "
                f"got {len(self.rope)}"
            )
        if self.values_in_keys and self.value_dim > self.key_dim:
            raise ValueError(
                f"Attention: values of {self.value_dim} channels can't be part of keys "
                f"of {self.key_dim}"
            )


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """The static shape of one layer's cache.

    Args:
      batch_size: B, rows (slots of a serving batch).
      num_kv_heads: K.
      capacity: tokens a row must be able to hold. A method may round it up to whole
        blocks; `CacheTransform.capacity` tells what a state really holds.
      head_dim: H.
      dtype: of keys, values and of what the cache keeps in full precision.
      rope: radians per token of each of the H/2 pairs of channels, by which a cache that is
        given keys before rotary embedding turns them.
    """

    batch_size: int
    num_kv_heads: int
    capacity: int
    head_dim: int
    dtype: Any = jnp.bfloat16
    rope: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("batch_size", "num_kv_heads", "capacity", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"CacheSpec: {name} must be a positive int, got {value!r}")
        dtype = jnp.dtype(self.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"CacheSpec: dtype must be a floating point type, got {dtype}")
        object.__setattr__(self, "dtype", dtype)
        if self.rope is not None and 2 * len(self.rope) != self.head_dim:
            raise ValueError(
                f"CacheSpec: rope must be of {self.head_dim // 2} pairs, got {len(self.rope)}"
            )


class Shared(NamedTuple):
    """What all rows of a state share: arrays whose leading axis is 1, not B."""

    value: Any


class KV(NamedTuple):
    """Dense keys and values, in no particular order of tokens.

    Attributes:
      keys: `B K S H`.
      values: `B K S H`.
      positions: position of the token in its sequence, -1 where there is no token; `B K S`, or
        `B 1 S` where all heads agree.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    positions: Int[Array, "B k S"]

    @property
    def mask(self) -> Bool[Array, "B k S"]:
        """True where a slot holds a token."""
        return self.positions >= 0


class RingKV(NamedTuple):
    """Dense keys and values of a pool, and of a ring that follows it.

    The ring's W slots hold the latest tokens: that at position p lies in slot p mod W, until the
    one at p + W does. Positions by this rule cost a kernel nothing to read.

    Attributes:
      keys: `B K S H`, S = P + W.
      values: `B K S H`.
      pool: positions of the tokens in the pool, -1 where there is none; P may be 0.
      start: tokens of the ring before this position are no longer there.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    pool: Int[Array, "B K P"]
    start: Int[Array, " B"]

    def located(self, length: Int[Array, " B"]) -> KV:
        """Returns the same with the position of each slot, for rows of this length."""
        batch, num_heads, num_slots, _ = self.keys.shape
        pool_slots = self.pool.shape[2]
        window = num_slots - pool_slots
        last = length[:, None] - 1
        positions = last - (last - jnp.arange(window, dtype=jnp.int32)) % window
        positions = jnp.where(positions >= self.start[:, None], positions, -1)[:, None]
        if pool_slots:
            positions = jnp.broadcast_to(positions, (batch, num_heads, window))
            positions = jnp.concatenate([self.pool, positions], -1)
        return KV(self.keys, self.values, positions)


class CodedSegment(NamedTuple):
    """The compressed past: codes of whole groups, in blocks of a fixed number of tokens.

    The token at position p of row b lies in block `block_table[b, p // block_size]`. A *hole*
    (a slot not written yet, or whose token is kept elsewhere) is a token without a value: its
    value code is all zero. So an all-zero segment is an empty one, and no mask is stored.

    Attributes:
      keys: `Code` of the keys, each leaf `[num_blocks, K, groups per block, ...]`.
      values: `Code` of the values, likewise.
      block_table: the blocks of each row, in order.
      num_coded: tokens coded so far; a multiple of the group size.
    """

    keys: Code
    values: Code
    block_table: Int[Array, "B M"]
    num_coded: Int[Array, " B"]


class CacheTransform(abc.ABC):
    """A method of keeping keys and values: pure functions over one layer's state.

    Instances are frozen dataclasses: they hash and compare by value, so they can be static
    arguments of `jax.jit`. For every method, at all times:

    - `attend(state, q)` equals dense attention over `read(state)`;
    - the state depends on the tokens, not on how they were cut into calls (but for what unused
      slots hold, and for methods that need a prompt: what is fitted to one depends on it);
    - rows of the batch don't influence each other;
    - structure, shapes and dtypes of the state never change.

    Bad shapes, dtypes and arguments raise `ValueError`. What depends on the values of arrays
    can only be checked outside `jax.jit`; there, keys or values that are not finite and tokens
    beyond the capacity raise `ValueError` too. Under `jax.jit` neither is silent: a NaN or Inf
    spreads to the row's output, and a row that was given more tokens than it holds attends to
    NaN from then on.

    Attributes:
      pre_rope: whether keys are to be given before rotary embedding, and the spec with `rope`. The
        cache turns them when it reads them, each to its position in the sequence.
    """

    pre_rope: bool = False

    @property
    def needs_prompt(self) -> bool:
        """Whether something is fitted to each row's prompt by `prefill`, and kept.

        Tokens may come by `append` alone; but then the method isn't at its best.
        """
        return False

    @property
    def needs_texts(self) -> bool:
        """Whether something is fitted to texts beforehand, by `kvq_jax.calibrate`.

        What it gives goes into the state by `with_params`. A state without attends to NaN.
        """
        return False

    def with_params(self, state: State, params: Params) -> State:
        """Returns the state of a layer with what was fitted to texts for this layer.

        Raises:
          ValueError: if it was fitted to something else.
        """
        if jax.tree.leaves(params):
            raise ValueError(f"{self} has no parameters")
        return state

    @abc.abstractmethod
    def init(self, spec: CacheSpec, layer: int | None = None) -> State:
        """Returns an empty cache.

        Args:
          spec: its shape.
          layer: index of the layer, for methods that treat layers differently; None asks for
            what most layers get. Layers of one spec have states of the same shape, but for those
            of a `Layered`.
        """

    @abc.abstractmethod
    def capacity(self, state: State) -> int:
        """Returns the number of tokens a row of the state can hold, at least the spec's."""

    @abc.abstractmethod
    def prefill(
        self,
        state: State,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        q: Float[Array, "B T N H"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> State:
        """Adds a right-padded batch of prompts.

        Args:
          state: the cache.
          k: keys, as attention uses them (after rotary embedding), but for `pre_rope`.
          v: values.
          q: queries, for methods that look at them.
          lengths: valid tokens of each row, 0 to T; None means T. What lies beyond is ignored.
        """

    @abc.abstractmethod
    def append(self, state: State, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> State:
        """Adds T >= 1 tokens to every row."""

    def make_room(
        self, states: tuple[State, ...], num_tokens: int
    ) -> tuple[tuple[State, ...], "CacheTransform"]:
        """Does ahead, for all layers at once, what `append` would do to make room.

        A model's step calls it before its first layer, and the `append` of what it returns once
        in every layer. The results are those of `append` alone. But what room is made for only
        now and then needs a look at the lengths, for which a GPU and its host wait for each
        other: so they do it once a step, not once a layer.

        Args:
          states: of all layers.
          num_tokens: T, as `append` will be given.

        Returns:
          The states, and the transform for the step.
        """
        del num_tokens
        return states, self

    def lacks_room(self, lengths: np.ndarray, num_tokens: int) -> bool:
        """Whether `make_room` would change anything; for a host that knows the lengths itself.

        Args:
          lengths: tokens of each row.
          num_tokens: that are to be added to each.
        """
        del lengths, num_tokens
        return False

    def with_room(self, num_tokens: int) -> "CacheTransform":
        """Returns the transform for a step of states that don't lack room for T tokens."""
        del num_tokens
        return self

    @abc.abstractmethod
    def attend(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention output of the last T tokens, which `append` has added.

        Args:
          state: the cache, holding the T tokens.
          q: their queries, in order; query t sees the tokens up to its own.
          sm_scale: factor of the scores; None means 1/sqrt(H).
          sliding_window: see only this many latest tokens, the query's own included.
          implementation: as in `kvq_jax.decode_attention`.
        """

    @abc.abstractmethod
    def read(self, state: State) -> KV:
        """Returns all tokens dense, as attention sees them."""

    def exact_calls(self, num_tokens: int) -> list[int]:
        """Cuts a sequence into calls of `append` that are as good as single tokens.

        With these sizes, `append` and `attend` of a call give each of its tokens what it would
        have got had the tokens come one by one: for measuring a cache on a given text quickly.

        Args:
          num_tokens: of the sequence, from an empty cache.

        Returns:
          Sizes of the calls, in order.
        """
        return [1] * num_tokens


def nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a state (or of any pytree of arrays or shapes)."""
    return sum(_leaf_bytes(x) for x in jax.tree.leaves(tree))


def nbytes_by_part(tree: Any) -> dict[str, int]:
    """Returns the bytes of each array of a state, by its name such as `coded.keys.words`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _leaf_bytes(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _leaf_bytes(x) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize


def check_tokens(
    transform: CacheTransform,
    state: State,
    k: Array,
    v: Array,
    spec: tuple[int, int, int],
    dtype: Any,
    lengths: Array | None = None,
) -> None:
    """Raises `ValueError` if k and v can't be added to the state.

    Args:
      transform: the state's method.
      state: the cache.
      k: keys, meant to be `B T K H`.
      v: values, meant to be `B T K H`.
      spec: the state's (batch_size, num_kv_heads, head_dim).
      dtype: the state's.
      lengths: valid tokens of each row of k and v; None means all.
    """
    batch_size, num_kv_heads, head_dim = spec
    for name, x in (("k", k), ("v", v)):
        b, t, *rest = x.shape if x.ndim == 4 else (0, 0)
        if (b, *rest) != (batch_size, num_kv_heads, head_dim) or t < 1:
            raise ValueError(
                f"{name} must be [B={batch_size}, T>=1, K={num_kv_heads}, H={head_dim}] "
                f"for this cache, got {x.shape}"
            )
        if x.dtype != dtype:
            raise ValueError(f"this cache holds {dtype}, got {name} of {x.dtype}: cast it")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {k.shape} and {v.shape}")
    num_tokens = k.shape[1]
    if lengths is not None and (
        lengths.shape != (batch_size,) or not jnp.issubdtype(lengths.dtype, jnp.integer)
    ):
        raise ValueError(
            f"lengths must be integers [B={batch_size}], got {lengths.dtype}{lengths.shape}"
        )
    if any(isinstance(x, Tracer) for x in (k, v, lengths, state.length)):
        return  # what follows needs values
    new = np.full(batch_size, num_tokens) if lengths is None else np.asarray(lengths)
    if new.min() < 0 or new.max() > num_tokens:
        raise ValueError(f"lengths must be 0 to T={num_tokens}, got {new.tolist()}")
    capacity = transform.capacity(state)
    total = np.asarray(state.length) + new
    if total.max() > capacity:
        row = int(total.argmax())
        raise ValueError(
            f"row {row} would hold {total[row]} tokens, its capacity is {capacity}: "
            "make the cache with a larger CacheSpec.capacity"
        )
    valid = np.arange(num_tokens) < new[:, None]
    for name, x in (("k", k), ("v", v)):
        finite = np.asarray(jnp.isfinite(x).all((2, 3)))
        if not (finite | ~valid).all():
            b, t = np.argwhere(~finite & valid)[0].tolist()
            raise ValueError(f"{name} is not finite at row {b}, token {t}")
