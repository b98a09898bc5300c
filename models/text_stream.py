# SPDX-License-Identifier: Apache-2.0
"""Text of token ids that arrive one by one, and of ids that continue a prompt."""

from collections.abc import Iterable, Sequence

import tokenizers

_INVALID = "\ufffd"
_LONG_WINDOW = 8


class TextDecoder:
    """Decodes ids with a `tokenizers.Tokenizer`, and knows where a text may be cut.

    The text of an id depends on its neighbours: a character may span tokens, and many
    decoders drop the space before the first token. So new ids are decoded together with the
    last few before them, and the text of those is cut off.

    Attributes:
      vocab_size: one more than the largest id; some ids below it may be unused.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._special_ids = frozenset(
            i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        # ByteFallback decodes a run of byte tokens as a whole: one invalid byte makes U+FFFD
        # of all of them, also of those before it.
        self._byte_ids: frozenset[int | None] = frozenset()
        if tokenizer.decoder is not None and b"ByteFallback" in tokenizer.decoder.__getstate__():
            self._byte_ids = frozenset(
                tokenizer.token_to_id(f"<0x{byte:{case}}>")
                for byte in range(256)
                for case in ("02X", "02x")
            )
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size += 1

    def decode(self, ids: Iterable[int], *, skip_special: bool) -> str:
        """Returns the text of ids; ids without a token have none."""
        shown = [i for i in ids if self.is_shown(i, skip_special=skip_special)]
        return self._tokenizer.decode(shown, skip_special_tokens=False)

    def is_shown(self, i: int, *, skip_special: bool) -> bool:
        """Returns whether an id has any text.

        Models have ids without a token: their vocabulary is often padded.

        Raises:
          ValueError: the id is negative.
        """
        if i < 0:
            raise ValueError(f"token id {i} is not in the vocabulary of {self.vocab_size}")
        return i < self.vocab_size and not (skip_special and i in self._special_ids)

    def context(self, ids: Sequence[int], *, skip_special: bool) -> list[int]:
        """Returns the last ids, as many as the text of further ones depends on."""
        last: list[int] = []
        for i in map(int, reversed(ids)):
            if not self.is_shown(i, skip_special=skip_special):
                continue
            last.append(i)
            if not self.is_byte(i):
                text = self.decode([i], skip_special=False)
                # Otherwise the token may begin within a character, or be no more than the
                # space that the decoder drops.
                if text and not text.startswith(_INVALID):
                    break
        return last[::-1]

    def is_byte(self, i: int) -> bool:
        """Returns whether an id is one byte of a byte-fallback tokenizer."""
        return i in self._byte_ids


class TextStream:
    """The text of ids as they come, never half a character."""

    def __init__(self, decoder: TextDecoder, prompt: Sequence[int], *, skip_special: bool):
        self._decoder, self._skip_special = decoder, skip_special
        self._window = decoder.context(prompt, skip_special=skip_special)
        # The part of the window's text that the reader has.
        self._given = decoder.decode(self._window, skip_special=skip_special)

    def push(self, i: int) -> str:
        """Takes an id; returns the text that is certain by now and wasn't before."""
        decoder = self._decoder
        if not decoder.is_shown(i, skip_special=self._skip_special):
            return ""
        self._window.append(i)
        if decoder.is_byte(i):
            return ""
        text = decoder.decode(self._window, skip_special=self._skip_special)
        # An incomplete character at the end reads as one U+FFFD.
        certain = text.removesuffix(_INVALID)
        piece = after(self._given, certain)
        if certain == text:
            self._window = decoder.context(self._window, skip_special=self._skip_special)
            self._given = decoder.decode(self._window, skip_special=self._skip_special)
        else:
            self._given = certain if piece else self._given
            self._drop_invalid(text)
        return piece

    def _drop_invalid(self, text: str) -> None:
        """Keeps the window short where a model goes on and on with invalid bytes."""
        if len(self._window) <= _LONG_WINDOW:
            return
        before = self._decoder.decode(self._window[:-1], skip_special=self._skip_special)
        last = self._decoder.decode(self._window[-1:], skip_special=self._skip_special)
        # Otherwise the last token continues a character.
        if before + last == text:
            self._window = self._window[-1:]
            self._given = self._given[len(before) :]

    def finish(self) -> str:
        """Returns the rest of the text."""
        return after(
            self._given, self._decoder.decode(self._window, skip_special=self._skip_special)
        )


def after(before: str, text: str) -> str:
    """Returns a text without the beginning that it shares with `before`."""
    if text.startswith(before):
        return text[len(before) :]
    differs = (i for i, (x, y) in enumerate(zip(before, text, strict=False)) if x != y)
    return text[next(differs, len(text)) :]
