# SPDX-License-Identifier: Apache-2.0
"""Where a row ends: stop tokens, stop strings, and the text up to them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvq_jax.decoding.arguments import plain, shown
from kvq_jax.models import Tokenizer

StopTokens = int | Iterable[int] | Sequence[Iterable[int]]
StopStrings = str | Sequence[str] | Sequence[Sequence[str]]


class Row:
    """What a row has given: tokens, and pieces of text where they are asked for.

    Attributes:
      tokens: its new tokens.
      done: whether it has ended.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer | None,
        limit: int,
        stop_tokens: frozenset[int],
        stop_strings: Sequence[str],
        *,
        streams: bool,
    ):
        """Begins a row.

        Args:
          prompt: token ids that come before.
          tokenizer: of the model, if it has one.
          limit: new tokens at most.
          stop_tokens: ids that end the row.
          stop_strings: texts that end it.
          streams: whether `add` gives pieces of text even if there are no stop strings.
        """
        self.tokens: list[int] = []
        self.done = False
        self._prompt, self._tokenizer = prompt, tokenizer
        self._limit, self._stop_tokens = limit, stop_tokens
        self._text: _StoppableText | None = None
        if tokenizer is not None and (streams or stop_strings):
            self._text = _StoppableText(tokenizer, prompt, stop_strings)

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is certain since."""
        self.tokens.append(token)
        self.done = token in self._stop_tokens or len(self.tokens) == self._limit
        if self._text is None:
            return ""
        piece = self._text.push(token)
        if self._text.stopped:
            self.done = True
        elif self.done:
            piece += self._text.finish()
        return piece

    def text(self) -> str | None:
        """Returns the text of a row that is done; None for a model without a tokenizer."""
        if self._tokenizer is None:
            return None
        if self._text is None:
            return self._tokenizer.continuation(self._prompt, self.tokens)
        return "".join(self._text.pieces)


class _StoppableText:
    """Text of tokens as they come, up to the first stop string.

    Attributes:
      pieces: the text so far that is certain to come before any stop string.
      stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str]):
        self._stream = tokenizer.start_stream(prompt, skip_special_tokens=True)
        self._stop_strings = stop_strings
        self._held = ""  # may be the beginning of a stop string
        self.pieces: list[str] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is certain since."""
        self._held += self._stream.push(token)
        if self._stop_strings:
            # Bytes wait in the stream for what follows, but a stop string may end with them.
            whole = self._held + self._stream.finish()
            if (end := self._first_stop(whole)) is not None:
                return self._stop(whole[:end])
        begun = max((_num_begun(x, self._held) for x in self._stop_strings), default=0)
        piece = self._held[: len(self._held) - begun]
        self._held = self._held[len(piece) :]
        return self._give(piece)

    def finish(self) -> str:
        """Returns the rest of the text."""
        rest = self._held + self._stream.finish()
        if (end := self._first_stop(rest)) is not None:
            return self._stop(rest[:end])
        return self._give(rest)

    def _first_stop(self, text: str) -> int | None:
        """Returns where the first stop string begins."""
        found = [i for x in self._stop_strings if (i := text.find(x)) >= 0]
        return min(found, default=None)

    def _stop(self, piece: str) -> str:
        self.stopped = True
        return self._give(piece)

    def _give(self, piece: str) -> str:
        self.pieces.append(piece)
        return piece


def _num_begun(stop_string: str, text: str) -> int:
    """Returns how much of a stop string, not all, the text ends with."""
    longest = min(len(stop_string) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop_string[:n])), 0)


def stop_sets(stop_tokens: StopTokens, batch_size: int) -> list[frozenset[int]]:
    """Returns the stop tokens of each row.

    Args:
      stop_tokens: an id or several for all rows, or several for each row.
      batch_size: number of rows.

    Raises:
      ValueError: for anything but token ids, or for lists that aren't one for each row.
    """
    return _for_each_row("stop tokens", stop_tokens, _id_set, batch_size)


def _for_each_row(name: str, value: Any, convert: Callable[[list], Any], batch_size: int) -> list:
    """Converts one list for all rows, or the list of each row."""
    entries = _listed(value)
    if not any(map(_is_many, entries)):
        return [convert(entries)] * batch_size
    if len(entries) != batch_size:
        raise ValueError(f"{len(entries)} lists of {name} for {batch_size} prompts")
    return [convert(_listed(entry)) for entry in entries]


def _is_many(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _listed(value: Any) -> list:
    value = plain(value)
    return list(map(plain, value)) if _is_many(value) else [value]


def _id_set(ids: Sequence[Any]) -> frozenset[int]:
    for i in ids:
        if isinstance(i, str):
            raise ValueError(
                f"stop_tokens takes token ids, got the text {shown(i)}: pass it as stop_strings"
            )
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(f"a stop token must be a token id, got {shown(i)}")
    return frozenset(ids)


def stop_texts(stop_strings: StopStrings | None, batch_size: int) -> list[tuple[str, ...]]:
    """Returns the stop strings of each row.

    Args:
      stop_strings: a text or several for all rows, or several for each row.
      batch_size: number of rows.

    Raises:
      ValueError: for anything but texts, an empty one, or for lists that aren't one for each row.
    """
    stop_strings = () if stop_strings is None else stop_strings
    return _for_each_row("stop strings", stop_strings, _texts, batch_size)


def _texts(texts: Sequence[Any]) -> tuple[str, ...]:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a stop string must be a text, got {shown(text)}")
        if not text:
            raise ValueError("a stop string must not be empty")
    return tuple(texts)
