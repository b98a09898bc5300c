# SPDX-License-Identifier: Apache-2.0
"""Where a row ends: its stop tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

from kvq_jax.decoding.arguments import plain, shown

StopTokens = int | Iterable[int] | Sequence[Iterable[int]]


def stop_sets(stop_tokens: StopTokens, batch_size: int) -> list[frozenset[int]]:
    """Returns the stop tokens of each row.

    Args:
      stop_tokens: an id or several for all rows, or several for each row.
      batch_size: number of rows.

    Raises:
      ValueError: for anything but token ids, or for lists that aren't one for each row.
    """
    entries = _listed(plain(stop_tokens))
    if not any(isinstance(entry, Iterable) and not isinstance(entry, str) for entry in entries):
        return [_id_set(entries)] * batch_size
    if len(entries) != batch_size:
        raise ValueError(f"{len(entries)} lists of stop tokens for {batch_size} prompts")
    return [_id_set(_listed(entry)) for entry in entries]


def _listed(value: Any) -> list:
    many = isinstance(value, Iterable) and not isinstance(value, str)
    return list(map(plain, value)) if many else [value]


def _id_set(ids: Sequence[Any]) -> frozenset[int]:
    for i in ids:
        if isinstance(i, str):
            raise ValueError(
                f"stop_tokens takes token ids, got the text {shown(i)}: pass it as stop_strings"
            )
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(f"a stop token must be a token id, got {shown(i)}")
    return frozenset(ids)
