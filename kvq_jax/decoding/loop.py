# SPDX-License-Identifier: Apache-2.0
"""The decode loop that `generate` and `stream` share."""

import collections
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from kvq_jax import methods
from kvq_jax.base import CacheTransform, Params
from kvq_jax.decoding.arguments import PerRow, for_each_row, plain, shown
from kvq_jax.decoding.prompts import Prompts, token_ids
from kvq_jax.decoding.sampling import Sampling, per_row
from kvq_jax.decoding.steps import as_call, begin, drawing_step, round_capacity
from kvq_jax.decoding.stopping import (
    Row,
    StopStrings,
    StopTokens,
    stop_sets,
    stop_texts,
)
from kvq_jax.models import Decoder, LoadedModel


class Step(NamedTuple):
    """What a step has given.

    Attributes:
      tokens: the new token of each row, -1 for a row that had ended.
      pieces: the text of each row that is certain since this step; "" without text.
    """

    tokens: Int[np.ndarray, " B"]
    pieces: list[str]


class Decoding:
    """Checks the arguments of `generate`, then yields each step.

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
        stop_strings: StopStrings | None,
        capacity: int | None,
        steps_per_call: int,
        streams: bool,
    ):
        """Checks the arguments.

        Args:
          model: as for `generate`, and so are the arguments that follow.
          prompts: one or a batch.
          method: of the cache.
          params: of each layer.
          max_new_tokens: of each row.
          sampling: of each row.
          seed: of each row.
          stop_tokens: of each row.
          stop_strings: of each row.
          capacity: of the cache.
          steps_per_call: of the device.
          streams: whether steps give pieces of text.
        """
        self._decoder = model.decoder if isinstance(model, LoadedModel) else model
        self._tokenizer = model.tokenizer if isinstance(model, LoadedModel) else None
        self._prompts = token_ids(prompts, self._tokenizer, self._decoder.config.vocab_size)
        batch_size = len(self._prompts)
        self._method = _checked_method(method, params)
        self._params = params
        self._sampling = per_row(sampling, seed, batch_size)
        limits = [
            _positive("max_new_tokens", entry)
            for entry in for_each_row("max_new_tokens", plain(max_new_tokens), batch_size)
        ]
        if stop_tokens is None:
            stop_tokens = self._tokenizer.stop_ids if self._tokenizer else ()
        ids, strings = stop_sets(stop_tokens, batch_size), stop_texts(stop_strings, batch_size)
        if self._tokenizer is None and (streams or any(strings)):
            name = "stream" if streams else "stop_strings"
            raise ValueError(f"a bare decoder has no text: {name} needs a model with a tokenizer")
        self.rows = [
            Row(prompt, self._tokenizer, limit, ends, texts, streams=streams)
            for prompt, limit, ends, texts in zip(self._prompts, limits, ids, strings, strict=True)
        ]
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
        self._marks: list[float] = []
        self.states: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Step]:
        """Yields each step once its tokens are there, until all rows have ended."""
        self._marks = [time.perf_counter()]
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

    def _add(self, new: np.ndarray, finite: np.ndarray) -> Step:
        """Gives each row its new token, unless it has ended."""
        done = np.array([row.done for row in self.rows])
        if not (finite | done).all():
            row = (finite | done).argmin()
            raise FloatingPointError(
                f"the logits of row {row} are not finite at new token "
                f"{len(self.rows[row].tokens)}: the model's weights or the range of its dtype do "
                "not bear this prompt"
            )
        tokens = np.where(done, -1, new)
        pieces = [
            "" if token < 0 else row.add(token)
            for row, token in zip(self.rows, tokens.tolist(), strict=True)
        ]
        return Step(tokens, pieces)

    @property
    def prefill_seconds(self) -> float:
        """Time until the first token, compilation included if there was any."""
        return self._marks[1] - self._marks[0]

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, from the second call that decodes on; NaN without one."""
        # Mark 1 is of the prefill's token, mark 2 of the first call, which may have compiled.
        timed = sum(max(0, len(row.tokens) - 1 - self._steps) for row in self.rows)
        return timed / (self._marks[-1] - self._marks[2]) if timed else float("nan")


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
