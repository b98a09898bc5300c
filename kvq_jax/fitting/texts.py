# SPDX-License-Identifier: Apache-2.0
"""Windows of calibration text: cut from given texts, or sampled from the model."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from kvq_jax.decoding.generation import generate
from kvq_jax.decoding.sampling import Sampling
from kvq_jax.methods.dense import dense
from kvq_jax.models import Decoder, LoadedModel


def cut_windows(
    model: LoadedModel | Decoder,
    texts: str | Sequence[str] | Sequence[Sequence[int]] | Int[np.ndarray, "n T"],
    context: int,
) -> Int[np.ndarray, "n T"]:
    """Returns windows of token ids.

    Args:
      model: the model; a bare decoder takes token ids only.
      texts: texts, each cut into windows, without the rest that fills none; or token ids, which
        are windows already.
      context: tokens of a window of text.

    Raises:
      ValueError: for texts without a whole window, and for what are not the model's token ids.
    """
    if isinstance(texts, str):
        texts = [texts]
    if not len(texts):
        raise ValueError("texts is empty: give at least one text, or None for self-generated text")
    decoder = model.decoder if isinstance(model, LoadedModel) else model
    if not any(isinstance(x, str) for x in texts):
        return _check_ids(texts, decoder.config.vocab_size)
    if not isinstance(model, LoadedModel):
        raise ValueError("a bare decoder takes windows of token ids, not texts")
    if not all(isinstance(x, str) for x in texts):
        raise ValueError("texts must be all texts or all token ids, got some of both")
    ids = [model.tokenizer.encode(str(text)) for text in texts]
    windows = [x[i : i + context] for x in ids for i in range(0, len(x) - context + 1, context)]
    if not windows:
        raise ValueError(
            f"no text has the {context} tokens of a window, the longest has "
            f"{max(map(len, ids))}: give longer texts, or a smaller context"
        )
    return _check_ids(windows, decoder.config.vocab_size)


def _check_ids(windows: Sequence | np.ndarray, vocab_size: int) -> Int[np.ndarray, "n T"]:
    try:
        ids = np.asarray(windows)
    except ValueError:  # rows of different lengths
        raise ValueError("windows of token ids must all have the same length") from None
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            "texts must be strings, or integer token ids with a window in each row, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    if ids.shape[1] < 2:
        raise ValueError(f"a window must have at least 2 tokens, got {ids.shape[1]}")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"token id {wrong[0]} is not in the vocabulary of {vocab_size} tokens")
    return ids.astype(np.int32)


def sample_texts(
    decoder: Decoder,
    num_windows: int,
    context: int,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Int[np.ndarray, "n T"]:
    """Returns windows of text sampled from the model, each from a random first token.

    Args:
      decoder: the model.
      num_windows: windows to sample, all in one batch with a dense cache.
      context: tokens of a window, at least 2.
      seed: seed of first tokens and sampling.
      on_progress: called with ("sampling", tokens of a window done, context).

    Raises:
      ValueError: for no windows, and for windows of fewer than 2 tokens.
    """
    if num_windows < 1:
        raise ValueError(f"num_windows must be at least 1, got {num_windows}")
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    done = itertools.count(2)

    def on_tokens(tokens: np.ndarray) -> None:
        del tokens
        if on_progress:
            on_progress("sampling", next(done), context)

    first = np.random.default_rng(seed).integers(0, decoder.config.vocab_size, (num_windows, 1))
    sampled = generate(
        decoder,
        first.tolist(),
        method=dense(),
        max_new_tokens=context - 1,
        sampling=Sampling(temperature=1.0),
        seed=seed,
        on_tokens=on_tokens,
    ).tokens
    return np.concatenate([first, sampled], axis=1).astype(np.int32)
