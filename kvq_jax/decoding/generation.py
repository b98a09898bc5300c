# SPDX-License-Identifier: Apache-2.0
"""Decoding text with any model and any cache."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvq_jax.base import CacheTransform, Params, nbytes
from kvq_jax.decoding.sampling import Sampling, sample
from kvq_jax.methods import ott
from kvq_jax.models import Decoder, Layer, LoadedModel, init_states

Prompts = str | Sequence[str | Sequence[int]]

CAPACITY_STEP = 512
"""Capacity is rounded up to this many tokens, so that few lengths compile anew."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: new tokens of each row, a stop token that ended it included.
      texts: their text, special tokens left out; [] for a model without a tokenizer.
      states: the cache of each layer at the end: of the prompts and all steps' tokens but the
        last, which is not fed back. More are in where stop tokens ended the batch, since the next
        call is under way by then, or calls of several steps went past the last token;
        `states[0].length` tells.
      prefill_seconds: time until the first token, compilation included if there was any.
      tokens_per_second: of all rows together, from the second call that decodes on; the first
        may compile. NaN if there was no second one.
    """

    tokens: list[list[int]]
    texts: list[str]
    states: tuple[Any, ...]
    prefill_seconds: float
    tokens_per_second: float


def generate(
    model: LoadedModel | Decoder,
    prompts: Prompts,
    *,
    method: CacheTransform | None = None,
    params: Sequence[Params] | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    capacity: int | None = None,
    steps_per_call: int = 1,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> Generation:
    """Decodes a batch of prompts of any lengths.

    New tokens go from step to step on the device. The host reads those of a call while the next
    one runs, so that the device never waits for it; unless the host takes longer to start a call
    than the device to run it, as with a small model on a GPU: `steps_per_call`.

    Prompts are padded to a bucket of lengths (`bucket`) and the cache to a multiple of 512
    tokens; each pair of sizes compiles once for a method, whatever the prompts.

    Args:
      model: from `kvq_jax.models.load`, or a bare decoder, which takes prompts of token ids.
      prompts: texts or lists of token ids; one text is a batch of one.
      method: how keys and values are kept; None takes `kvq_jax.ott()`.
      params: of each layer, from `kvq_jax.calibrate`, for a method that needs texts.
      max_new_tokens: of each row.
      sampling: how tokens are drawn; None takes the most likely.
      seed: of the draws.
      stop_tokens: token ids that end a row, or a list of them for each row; None takes the
        tokenizer's, () none.
      capacity: tokens a row of the cache can hold; None takes what is needed.
      steps_per_call: steps that the device is told to run at a time. Of the last call's, those
        past `max_new_tokens` are in vain; groups are coded for a call as for a step that adds
        as many tokens.
      on_tokens: called with the new tokens of each step, `int32[B]`, -1 for a row that has
        ended; for printing as they come.

    Raises:
      ValueError: for an empty prompt, a token id outside the vocabulary, a capacity that does
        not suffice and other arguments out of range.
      FloatingPointError: if the logits of a row are not finite.
    """
    decoder = model.decoder if isinstance(model, LoadedModel) else model
    tokenizer = model.tokenizer if isinstance(model, LoadedModel) else None
    ids = _token_ids(prompts, tokenizer, decoder.config.vocab_size)
    if stop_tokens is None:
        stop_tokens = tokenizer.stop_ids if tokenizer else ()
    stops = _stop_sets(stop_tokens, len(ids))
    method = ott() if method is None else method
    sampling = Sampling() if sampling is None else sampling
    if method.needs_texts and params is None:
        raise ValueError(f"{method} needs parameters: kvq_jax.calibrate makes them")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if steps_per_call < 1:
        raise ValueError(f"steps_per_call must be at least 1, got {steps_per_call}")
    # The last new token is returned, not fed back.
    calls = -(-(max_new_tokens - 1) // steps_per_call)
    needed = max(map(len, ids)) + calls * steps_per_call
    if capacity is None:
        capacity = round_capacity(needed)
    if capacity < needed:
        raise ValueError(
            f"a prompt of {max(map(len, ids))} tokens and {max_new_tokens} new ones, "
            f"{steps_per_call} a call, need a capacity of {needed}, got {capacity}"
        )

    start = time.perf_counter()
    step = drawing_step(decoder, method, sampling, list(map(len, ids)), steps_per_call)
    key = jax.random.key(seed)
    states = init_states(decoder.config, method, len(ids), capacity, decoder.dtype, params)
    logits, states = prefill(decoder, method, states, pad(ids))
    last = _draw(logits, sampling, key, jnp.zeros((), jnp.int32))
    unread = collections.deque([_stacked(last)])
    tokens: list[list[int]] = [[] for _ in ids]
    done = np.zeros(len(ids), bool)
    marks = []
    for i in range(calls + 1):
        # One call runs ahead from the third on: the first doesn't wait until the step has
        # compiled, and at the second, when the clock starts, nothing is under way.
        ahead = min(i + 1 + (i > 1), calls + 1)
        while i + len(unread) < ahead:
            last, drawn, states = step(states, last, key)
            unread.append(drawn)
        read = jax.device_get(unread.popleft())
        marks.append(time.perf_counter())
        for new, finite, number in zip(read.tokens, read.finite, read.step.tolist(), strict=True):
            if done.all() or number == max_new_tokens:
                break
            _check_finite(finite | done, number)
            shown = np.where(done, -1, new)
            for row, token in enumerate(shown.tolist()):
                if not done[row]:
                    tokens[row].append(token)
                    done[row] = token in stops[row]
            if on_tokens:
                on_tokens(shown)
        if done.all():
            break
    # Marks 0 and 1 are those of the prefill's token and of the first call.
    timed = sum(max(0, len(row) - 1 - steps_per_call) for row in tokens)
    return Generation(
        tokens=tokens,
        texts=[tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        if tokenizer
        else [],
        states=states,
        prefill_seconds=marks[0] - start,
        tokens_per_second=timed / (marks[-1] - marks[1]) if timed else float("nan"),
    )


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
      step: how many new tokens came before; it is folded into the key of the draw.
    """

    tokens: Int[Array, "*S B"]
    finite: Bool[Array, "*S B"]
    step: Int[Array, "*S"]


def drawing_step(
    decoder: Decoder,
    method: CacheTransform,
    sampling: Sampling,
    lengths: Sequence[int],
    steps_per_call: int = 1,
) -> Callable:
    """Returns a jitted (states, last Drawn, key) -> (last, all Drawn, states).

    As `decode_step`, with the draw in the same dispatch; and the host counts the tokens, so that
    no step has to wait until it is known whether there is something to be coded.

    Args:
      decoder: the model.
      method: of the states.
      sampling: how tokens are drawn.
      lengths: tokens of each row before the first step.
      steps_per_call: one after the other.
    """
    params, structure = jax.tree.flatten(decoder)
    roomy = method.with_room(steps_per_call)
    step = _jitted_drawing_step(structure, roomy, sampling, steps_per_call)
    count = np.array(lengths)

    def run(states, last, key):
        if method.lacks_room(count, steps_per_call):
            states = tuple(_make_room(state, method, steps_per_call) for state in states)
        count[:] += steps_per_call
        return step(params, states, last, key)

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


@functools.partial(jax.jit, static_argnames="sampling")
def _draw(logits: jax.Array, sampling: Sampling, key: jax.Array, step: jax.Array) -> Drawn:
    tokens = sample(logits, sampling, jax.random.fold_in(key, step))
    return Drawn(tokens, jnp.isfinite(logits).all(-1), step)


def _stacked(drawn: Drawn) -> Drawn:
    """Returns what one step has drawn as a call of one step."""
    return jax.tree.map(lambda x: x[None], drawn)


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
def _jitted_drawing_step(
    structure: Any, method: CacheTransform, sampling: Sampling, steps: int
) -> Callable:
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, states, last, key):
        decoder = jax.tree.unflatten(structure, params)

        def one(carry, _):
            states, last = carry
            hidden, states = decoder(last.tokens[:, None], states, method)
            drawn = _draw(decoder.logits(hidden[:, -1]), sampling, key, last.step + 1)
            return (states, drawn), drawn

        if steps == 1:
            (states, last), _ = one((states, last), None)
            return last, _stacked(last), states
        (states, last), drawn = jax.lax.scan(one, (states, last), length=steps)
        return last, drawn, states

    return step


def _token_ids(prompts: Prompts, tokenizer, vocab_size: int) -> list[list[int]]:
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    if not batch:
        raise ValueError("prompts is empty: give at least one")
    ids = []
    for row, prompt in enumerate(batch):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a bare decoder takes prompts of token ids, not texts")
            prompt = tokenizer.encode(prompt)
        prompt = [int(i) for i in prompt]
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < vocab_size)
            raise ValueError(f"prompt {row}: token id {wrong} is not in 0 to {vocab_size - 1}")
        ids.append(prompt)
    return ids


def _stop_sets(stop_tokens, batch_size: int) -> list[set[int]]:
    stop_tokens = list(stop_tokens)
    if not stop_tokens or isinstance(stop_tokens[0], int):
        return [set(stop_tokens)] * batch_size
    if len(stop_tokens) != batch_size:
        raise ValueError(f"{len(stop_tokens)} lists of stop tokens for {batch_size} prompts")
    return [set(row) for row in stop_tokens]


def _check_finite(finite: np.ndarray, step: int) -> None:
    if not finite.all():
        raise FloatingPointError(
            f"the logits of row {finite.argmin()} are not finite at new token {step}: "
            "the model's weights or the range of its dtype do not bear this prompt"
        )
