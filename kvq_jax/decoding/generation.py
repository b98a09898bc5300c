# SPDX-License-Identifier: Apache-2.0
"""Decoding text with any model and any cache."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kvq_jax import methods
from kvq_jax.base import CacheTransform, Params
from kvq_jax.decoding.arguments import PerRow, for_each_row, plain, shown
from kvq_jax.decoding.prompts import Prompts, token_ids
from kvq_jax.decoding.sampling import Sampling, per_row
from kvq_jax.decoding.steps import as_call, begin, drawing_step, round_capacity
from kvq_jax.decoding.stopping import StopTokens, stop_sets
from kvq_jax.models import Decoder, LoadedModel, Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: new tokens of each row, a stop token that ended it included.
      texts: their text, special tokens left out; [] for a model without a tokenizer.
      states: the cache of each layer at the end: of the prompts and all steps' tokens but the
        last, which is not fed back. It may hold a few tokens more: of a step that was under way
        when the batch stopped, or the rest of a call of several steps. `states[0].length` gives
        the count.
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
    max_new_tokens: int | PerRow = 64,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | PerRow = 0,
    stop_tokens: StopTokens | None = None,
    capacity: int | None = None,
    steps_per_call: int = 1,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> Generation:
    """Decodes a batch of prompts of any lengths.

    New tokens go from step to step on the device. The host reads those of a call while the next
    one runs, so that the device never waits for it; unless the host takes longer to start a call
    than the device to run it, as with a small model on a GPU: `steps_per_call`.

    Prompts are padded to a bucket of lengths (`bucket`) and the cache to a multiple of 512
    tokens; each pair of sizes compiles once for a method, whatever the prompts, the sampling
    settings and the seeds.

    Args:
      model: from `kvq_jax.models.load`, or a bare decoder, which takes prompts of token ids.
      prompts: texts, lists of token ids, or conversations (lists of messages with "role" and
        "content", for the model's chat template). One that is in no list is a batch of one.
      method: how keys and values are kept; None takes `kvq_jax.ott()`.
      params: of each layer, from `kvq_jax.calibrate`, for a method that needs texts.
      max_new_tokens: of all rows, or one for each row.
      sampling: how tokens are drawn: for all rows, or one for each row; None takes the most
        likely.
      seed: of the draws: one for each row, or one for all. A row with its own seed draws the same
        tokens in any batch and at any place in it. From one seed for all, row 0 draws as it would
        with that seed of its own, and each other row independently.
      stop_tokens: token ids that end a row, or a list of them for each row; None takes the
        tokenizer's, () none.
      capacity: tokens a row of the cache can hold; None takes what is needed.
      steps_per_call: steps that the device is told to run at a time. Steps of the last call past
        `max_new_tokens` are discarded. All tokens of a call stay in the cache's residual window.
      on_tokens: called with the new tokens of each step, `int32[B]`, -1 for a row that has
        ended; for printing as they come.

    Raises:
      ValueError: for an empty prompt, a token id outside the vocabulary, a capacity that does
        not suffice and other arguments out of range.
      FloatingPointError: if the logits of a row are not finite.
    """
    decoding = Decoding(
        model,
        prompts,
        method=method,
        params=params,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        capacity=capacity,
        steps_per_call=steps_per_call,
    )
    for tokens in decoding:
        if on_tokens:
            on_tokens(tokens)
    return decoding.result()


class Decoding:
    """The decode loop of `generate`: checks its arguments, then yields the tokens of each step.

    Attributes:
      rows: what each row has given so far.
      states: the cache of each layer, once the loop has begun.
    """

    def __init__(
        self,
        model: LoadedModel | Decoder,
        prompts: Prompts,
        *,
        method: CacheTransform | None,
        params: Sequence[Params] | None,
        max_new_tokens: int | PerRow,
        sampling: Sampling | Sequence[Sampling] | None,
        seed: int | PerRow,
        stop_tokens: StopTokens | None,
        capacity: int | None,
        steps_per_call: int,
    ):
        self._decoder = model.decoder if isinstance(model, LoadedModel) else model
        self._tokenizer = model.tokenizer if isinstance(model, LoadedModel) else None
        self._prompts = token_ids(prompts, self._tokenizer, self._decoder.config.vocab_size)
        batch_size = len(self._prompts)
        if stop_tokens is None:
            stop_tokens = self._tokenizer.stop_ids if self._tokenizer else ()
        self._method = _checked_method(method, params)
        self._params = params
        self._sampling = per_row(sampling, seed, batch_size)
        limits = [
            _positive("max_new_tokens", entry)
            for entry in for_each_row("max_new_tokens", plain(max_new_tokens), batch_size)
        ]
        self.rows = [Row(*x) for x in zip(limits, stop_sets(stop_tokens, batch_size), strict=True)]
        self._steps = _positive("steps_per_call", steps_per_call)
        # The last new token is returned, not fed back.
        self._calls = -(-(max(limits) - 1) // self._steps)
        longest = max(map(len, self._prompts))
        needed = longest + self._calls * self._steps
        self._capacity = (
            round_capacity(needed) if capacity is None else _positive("capacity", capacity)
        )
        if self._capacity < needed:
            raise ValueError(
                f"a prompt of {longest} tokens and {max(limits)} new ones, {self._steps} a call, "
                f"need a capacity of {needed}, got {capacity}"
            )
        self._step = drawing_step(
            self._decoder, self._method, list(map(len, self._prompts)), self._steps
        )
        self._start = 0.0
        self._marks: list[float] = []
        self.states: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Int[np.ndarray, " B"]]:
        """Yields the new tokens of each step, -1 for a row that has ended."""
        self._start = time.perf_counter()
        last, states = begin(
            self._decoder,
            self._method,
            self._params,
            self._prompts,
            self._capacity,
            self._sampling,
        )
        unread = collections.deque([as_call(last)])
        for i in range(self._calls + 1):
            # One call runs ahead from the third on: the first doesn't wait until the step has
            # compiled, and at the second, when the clock starts, nothing is under way.
            ahead = min(i + 1 + (i > 1), self._calls + 1)
            while i + len(unread) < ahead:
                last, drawn, states = self._step(states, last, self._sampling)
                unread.append(drawn)
            self.states = states
            read = jax.device_get(unread.popleft())
            self._marks.append(time.perf_counter())
            for new, finite in zip(read.tokens, read.finite, strict=True):
                if all(row.done for row in self.rows):
                    return
                yield self._add(new, finite)
            if all(row.done for row in self.rows):
                return

    def _add(self, new: np.ndarray, finite: np.ndarray) -> np.ndarray:
        done = np.array([row.done for row in self.rows])
        if not (finite | done).all():
            row = (finite | done).argmin()
            raise FloatingPointError(
                f"the logits of row {row} are not finite at new token "
                f"{len(self.rows[row].tokens)}: the model's weights or the range of its dtype do "
                "not bear this prompt"
            )
        for row, token in zip(self.rows, new.tolist(), strict=True):
            if not row.done:
                row.add(token)
        return np.where(done, -1, new)

    def result(self) -> Generation:
        """Returns what all steps together have given."""
        tokens = [row.tokens for row in self.rows]
        # Marks 0 and 1 are those of the prefill's token and of the first call.
        timed = sum(max(0, len(row) - 1 - self._steps) for row in tokens)
        return Generation(
            tokens=tokens,
            texts=_texts(self._tokenizer, tokens) if self._tokenizer else [],
            states=self.states,
            prefill_seconds=self._marks[0] - self._start,
            tokens_per_second=timed / (self._marks[-1] - self._marks[1]) if timed else float("nan"),
        )


class Row:
    """What a row has given.

    Attributes:
      tokens: its new tokens.
      done: whether it has ended.
    """

    def __init__(self, limit: int, stop_tokens: frozenset[int]):
        """Begins a row.

        Args:
          limit: new tokens at most.
          stop_tokens: ids that end it.
        """
        self._limit = limit
        self._stop_tokens = stop_tokens
        self.tokens: list[int] = []
        self.done = False

    def add(self, token: int) -> None:
        """Adds a token."""
        self.tokens.append(token)
        self.done = token in self._stop_tokens or len(self.tokens) == self._limit


def _texts(tokenizer: Tokenizer, tokens: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def _checked_method(method: Any, params: Sequence[Params] | None) -> CacheTransform:
    if method is None:
        return methods.ott()
    if not isinstance(method, CacheTransform):
        name = method if isinstance(method, str) else getattr(method, "__name__", "ott")
        name = name if name in methods.__all__ and name.islower() else "ott"
        raise ValueError(f"method must be a cache such as kvq.{name}(), got {shown(method)}")
    if method.needs_texts and params is None:
        raise ValueError(f"{method} needs parameters: kvq_jax.calibrate makes them")
    return method


def _positive(name: str, value: Any) -> int:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(value)}")
    return value
