# SPDX-License-Identifier: Apache-2.0
"""The integer rules of a cache: who sees whom, where a token lies, what is due to be quantized.

They run on NumPy arrays on the host and on jnp arrays; those that kernels need use arithmetic and
comparisons alone, so they run on the scalars of a Pallas kernel and on the registers of the GPU
kernel too.
"""

from typing import Any


def sees(query: Any, key: Any, sliding_window: int | None = None) -> Any:
    """Returns whether the token at position `query` sees that at position `key`.

    Args:
      query: position of a query.
      key: position of a key, at least 0.
      sliding_window: how many latest tokens a query sees, its own included; None means all.
    """
    seen = key <= query
    return seen if sliding_window is None else seen & (key > query - sliding_window)


def first_seen(length: Any, num_tokens: int, sliding_window: int) -> Any:
    """Returns the position before which none of the last T tokens sees any; may be negative.

    Args:
      length: tokens of a row, the T latest included.
      num_tokens: T.
      sliding_window: as in `sees`.
    """
    return length - (num_tokens + sliding_window - 1)


def ring_position(slot: Any, length: Any, num_slots: int) -> Any:
    """Returns the position of the token in a slot of a ring that holds the latest tokens.

    The token at position p lies in slot p mod `num_slots`. Negative where none was written yet.

    Args:
      slot: 0 to num_slots - 1.
      length: tokens written so far.
      num_slots: of the ring.
    """
    last = length - 1
    # The dividend is never negative: registers and C divide towards zero.
    return last - (last + num_slots - slot) % num_slots


def coded_tokens(length: Any, window: int, group_size: int) -> Any:
    """Returns how many tokens of a row must be coded for its window to hold the others.

    Args:
      length: tokens of a row.
      window: slots of its ring.
      group_size: tokens coded at a time.
    """
    return ((length - window).clip(0) + group_size - 1) // group_size * group_size


def due(length: Any, num_coded: Any, num_tokens: Any, window: int, group_size: int) -> Any:
    """Returns how many groups must be coded before T tokens find room in the window.

    Only whole groups of tokens that are there can be coded: what then still lacks room shows by
    `lacks_room`.

    Args:
      length: tokens of a row, without the T new ones.
      num_coded: of these, tokens already coded.
      num_tokens: T.
      window: slots of the ring.
      group_size: tokens coded at a time.
    """
    missing = coded_tokens(length + num_tokens, window, group_size) - num_coded
    there = length - num_coded
    return (missing - (missing - there).clip(0)).clip(0) // group_size


def lacks_room(length: Any, num_coded: Any, window: int) -> Any:
    """Returns whether a ring has lost tokens that nobody has coded: attention is NaN then."""
    return length - num_coded > window
