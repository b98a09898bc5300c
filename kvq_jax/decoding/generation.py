# SPDX-License-Identifier: Apache-2.0
"""Decoding text with any model and any cache."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from kvq_jax.base import CacheTransform, Params
from kvq_jax.decoding.arguments import PerRow
from kvq_jax.decoding.loop import Decoding
from kvq_jax.decoding.prompts import Prompts, is_one
from kvq_jax.decoding.sampling import Sampling
from kvq_jax.decoding.stopping import StopStrings, StopTokens
from kvq_jax.models import Decoder, LoadedModel


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: new tokens of each row, those that ended it included.
      texts: the text that they add to their prompts, special tokens left out, cut before a stop
        string; [] for a model without a tokenizer.
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
    stop_strings: StopStrings | None = None,
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
      stop_strings: texts that end a row: one or several for all rows, or a list of them for each
        row. They are found across tokens, and the row's text is cut before them.
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
        stop_strings=stop_strings,
        capacity=capacity,
        steps_per_call=steps_per_call,
        streams=False,
    )
    for step in decoding:
        if on_tokens:
            on_tokens(step.tokens)
    return _generation(decoding)


def stream(
    model: LoadedModel,
    prompts: Prompts,
    *,
    method: CacheTransform | None = None,
    params: Sequence[Params] | None = None,
    max_new_tokens: int | PerRow = 64,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | PerRow = 0,
    stop_tokens: StopTokens | None = None,
    stop_strings: StopStrings | None = None,
    capacity: int | None = None,
    steps_per_call: int = 1,
) -> Generator[Any, None, Generation]:
    """Decodes prompts and yields their text as it comes.

    ```python
    for piece in kvq.stream(model, "The capital of France is"):
        print(piece, end="", flush=True)
    ```

    Pieces hold whole characters. What may be the beginning of a stop string is held back until
    that is decided, so the pieces of a row joined are its text in `Generation.texts`. When the
    consumer stops early (`break`, `close()`), decoding stops and the cache is freed.

    Args:
      model: from `kvq_jax.models.load`.
      prompts: a text, a list of token ids or a conversation; or a batch of them in a list.
      method: how keys and values are kept; None takes `kvq_jax.ott()`.
      params: of each layer, from `kvq_jax.calibrate`, for a method that needs texts.
      max_new_tokens: of all rows, or one for each row.
      sampling: how tokens are drawn: for all rows, or one for each row.
      seed: of the draws: one for each row, or one for all.
      stop_tokens: token ids that end a row, or a list of them for each row.
      stop_strings: texts that end a row, or a list of them for each row.
      capacity: tokens a row of the cache can hold; None takes what is needed.
      steps_per_call: steps that the device is told to run at a time; their text comes together.

    Yields:
      Pieces of text for one prompt; for a batch, pairs of a row's index and a piece.

    Returns:
      The `Generation`, as the value of `yield from`.

    Raises:
      ValueError: at the call, for the arguments that `generate` refuses.
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
        stop_strings=stop_strings,
        capacity=capacity,
        steps_per_call=steps_per_call,
        streams=True,
    )
    return _pieces(decoding, one=is_one(prompts))


def _pieces(decoding: Decoding, *, one: bool) -> Generator[Any, None, Generation]:
    for step in decoding:
        for row, piece in enumerate(step.pieces):
            if piece:
                yield piece if one else (row, piece)
    return _generation(decoding)


def _generation(decoding: Decoding) -> Generation:
    texts = [row.text() for row in decoding.rows]
    return Generation(
        tokens=[row.tokens for row in decoding.rows],
        texts=[text for text in texts if text is not None],
        states=decoding.states,
        prefill_seconds=decoding.prefill_seconds,
        tokens_per_second=decoding.tokens_per_second,
    )
