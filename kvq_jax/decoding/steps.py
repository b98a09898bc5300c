# SPDX-License-Identifier: Apache-2.0
"""Prefill, the jitted decode step, and whatever else of generation touches the cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvq_jax.base import CacheTransform, Params, nbytes
from kvq_jax.decoding.sampling import RowSampling, sample
from kvq_jax.models import Decoder, Layer, init_states

CAPACITY_STEP = 512
"""Capacity is rounded up to this many tokens, so that few lengths compile anew."""


class Padded(NamedTuple):
    """Right-padded prompts: tokens `int32[B, T]` and lengths `int32[B]`."""

    tokens: np.ndarray
    lengths: np.ndarray


def pad(ids: Sequence[Sequence[int]]) -> Padded:
    """Pads prompts to the bucket of the longest."""
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), bucket(int(lengths.max()))), np.int32)
    for row, content in enumerate(ids):
        tokens[row, : len(content)] = content
    return Padded(tokens, lengths)


def round_capacity(num_tokens: int) -> int:
    """Returns the capacity that `generate` takes for this many tokens."""
    return -(-num_tokens // CAPACITY_STEP) * CAPACITY_STEP


def bucket(length: int) -> int:
    """Returns the padded length of a prompt: a power of two from 64, or whole 1024s above."""
    if length > 1024:
        return -(-length // 1024) * 1024
    return max(64, 1 << (length - 1).bit_length())


def prefill(
    decoder: Decoder, method: CacheTransform, states: tuple[Any, ...], prompts: Padded
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Runs padded prompts; returns the logits of their last tokens `B V` and the states.

    Layers run one by one, so that one compilation serves them all. The given states are donated.
    """
    tokens, lengths = map(jnp.asarray, prompts)
    hidden, states = decoder.prefill(
        tokens, states, method, lengths=lengths, run_layer=_prefill_layer
    )
    return _last_logits(decoder, hidden, lengths), states


def decode_step(decoder: Decoder, method: CacheTransform) -> Callable:
    """Returns a jitted (states, tokens `B T`) -> (logits of the last token `B V`, states).

    The states are donated: the cache is updated in place.
    """
    # A flat list of arrays is what jit dispatches fastest, 30 layers at a time.
    params, structure = jax.tree.flatten(decoder)
    step = _jitted_step(structure, method)
    return lambda states, tokens: step(params, states, tokens)


class Drawn(NamedTuple):
    """The new tokens of a step, or of some, which are then the leading axis.

    Attributes:
      tokens: one of each row.
      finite: False for a row whose logits were not.
      number: how many new tokens of the row came before; it is folded into the row's key.
    """

    tokens: Int[Array, "*S B"]
    finite: Bool[Array, "*S B"]
    number: Int[Array, "*S B"]


def begin(
    decoder: Decoder,
    method: CacheTransform,
    params: Sequence[Params] | None,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    sampling: RowSampling,
) -> tuple[Drawn, tuple[Any, ...]]:
    """Prefills a new cache; returns the first new token of each row and the states.

    Args:
      decoder: the model.
      method: of the cache.
      params: of each layer, or None.
      prompts: token ids of each row.
      capacity: tokens that a row of the cache can hold.
      sampling: how tokens are drawn.
    """
    states = init_states(decoder.config, method, len(prompts), capacity, decoder.dtype, params)
    logits, states = prefill(decoder, method, states, pad(prompts))
    return _draw(logits, sampling, jnp.zeros(len(prompts), jnp.int32)), states


def drawing_step(
    decoder: Decoder,
    method: CacheTransform,
    lengths: Sequence[int],
    steps_per_call: int = 1,
) -> Callable:
    """Returns a jitted (states, last Drawn, RowSampling) -> (last, all Drawn, states).

    As `decode_step`, with the draw in the same dispatch; and the host counts the tokens, so that
    no step has to wait until it is known whether there is something to be coded.

    Args:
      decoder: the model.
      method: of the states.
      lengths: tokens of each row before the first step.
      steps_per_call: one after the other.

    Raises:
      ValueError: for more steps than the method can run without making room between them.
    """
    params, structure = jax.tree.flatten(decoder)
    step = _jitted_drawing_step(structure, _with_room(method, steps_per_call), steps_per_call)
    count = np.array(lengths)

    def run(states, last, sampling):
        if method.lacks_room(count, steps_per_call):
            states = tuple(_make_room(state, method, steps_per_call) for state in states)
        count[:] += steps_per_call
        return step(params, states, last, sampling)

    return run


def cache_nbytes(
    decoder: Decoder, method: CacheTransform, batch_size: int, capacity: int, dtype: Any
) -> int:
    """Returns the bytes of all layers' caches, without making them."""
    init = functools.partial(init_states, decoder.config, method, batch_size, capacity, dtype)
    return nbytes(jax.eval_shape(init))


_prefill_layer = jax.jit(Layer.prefill, static_argnames="cache", donate_argnames="state")


@jax.jit
def _last_logits(decoder: Decoder, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return decoder.logits(last)


@jax.jit
def _draw(logits: jax.Array, sampling: RowSampling, index: jax.Array) -> Drawn:
    return Drawn(sample(logits, sampling, index), jnp.isfinite(logits).all(-1), index)


def as_call(drawn: Drawn) -> Drawn:
    """Returns what one step has drawn as a call of one step."""
    return jax.tree.map(lambda x: x[None], drawn)


def _with_room(method: CacheTransform, steps_per_call: int) -> CacheTransform:
    """Returns the method for calls of this many steps.

    Raises:
      ValueError: if its window holds fewer.
    """
    try:
        return method.with_room(steps_per_call)
    except ValueError as error:
        fits, too_many = 1, steps_per_call
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            try:
                method.with_room(middle)
                fits = middle
            except ValueError:
                too_many = middle
        raise ValueError(
            f"steps_per_call must be at most {fits} for this method, got {steps_per_call}: all "
            "tokens of a call stay in its residual window"
        ) from error


# A layer at a time, as in prefill: in one program all layers took long to compile.
@functools.partial(jax.jit, static_argnames=("method", "num_tokens"), donate_argnames="state")
def _make_room(state: Any, method: CacheTransform, num_tokens: int) -> Any:
    (state,), _ = method.make_room((state,), num_tokens)
    return state


@functools.lru_cache(maxsize=32)
def _jitted_step(structure: Any, method: CacheTransform) -> Callable:
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, states, tokens):
        decoder = jax.tree.unflatten(structure, params)
        hidden, states = decoder(tokens, states, method)
        return decoder.logits(hidden[:, -1]), states

    return step


@functools.lru_cache(maxsize=32)
def _jitted_drawing_step(structure: Any, method: CacheTransform, steps: int) -> Callable:
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, states, last, sampling):
        decoder = jax.tree.unflatten(structure, params)

        def one(carry, _):
            states, last = carry
            hidden, states = decoder(last.tokens[:, None], states, method)
            drawn = _draw(decoder.logits(hidden[:, -1]), sampling, last.number + 1)
            return (states, drawn), drawn

        if steps == 1:
            (states, last), _ = one((states, last), None)
            return last, as_call(last), states
        (states, last), drawn = jax.lax.scan(one, (states, last), length=steps)
        return last, drawn, states

    return step
