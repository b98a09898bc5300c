# SPDX-License-Identifier: Apache-2.0
"""Prompts as people write them, turned into token ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kvq_jax.decoding.arguments import plain, shown
from kvq_jax.models import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
Prompts = Prompt | Sequence[Prompt | np.ndarray | jax.Array] | np.ndarray | jax.Array


def is_one(prompts: Any) -> bool:
    """Returns whether this is one prompt, not a batch: a text, token ids, or a conversation."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array) or len(prompts) == 0:
        return False
    return not isinstance(plain(prompts[0]), str | bytes | Sequence)


def token_ids(prompts: Prompts, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """Returns the token ids of each prompt.

    Args:
      prompts: one or a batch; each a text, token ids, or the messages of a conversation.
      tokenizer: of the model; None admits token ids only.
      vocab_size: ids must be less.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be texts or lists of token ids, got {shown(prompts)}")
    batch = [prompts] if is_one(prompts) else list(prompts)
    if not batch:
        raise ValueError("prompts is empty: give at least one")
    return [_ids(row, plain(x), tokenizer, vocab_size) for row, x in enumerate(batch)]


def _ids(row: int, prompt: Any, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a bare decoder takes prompts of token ids, not texts")
        prompt = tokenizer.encode(prompt)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        if tokenizer is None:
            raise ValueError(
                "a bare decoder takes prompts of token ids, not messages: it has no chat template"
            )
        text = tokenizer.apply_chat_template(prompt)
        prompt = tokenizer.encode(text, add_special_tokens=False)
    elif isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise ValueError(
            f"prompt {row} must be a text, a list of token ids or a list of messages for the chat "
            f"template, got {shown(prompt)}"
        )
    if not prompt:
        raise ValueError(f"prompt {row} has no tokens")
    for i in prompt:
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(f"prompt {row}: a token id must be an integer, got {shown(i)}")
        if not 0 <= i < vocab_size:
            raise ValueError(f"prompt {row}: token id {shown(i)} is not in 0 to {vocab_size - 1}")
    return list(prompt)
