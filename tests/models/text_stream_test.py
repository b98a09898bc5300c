# SPDX-License-Identifier: Apache-2.0
import random

import pytest
from tokenizers import decoders

from kvq_jax.models import Tokenizer
from kvq_jax.models.text_stream import TextDecoder
from tests.models.vocabularies import byte_level, sentencepiece


def test_an_id_without_a_token_is_the_empty_text():
    tokenizer = Tokenizer(byte_level(Z=310))
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    # 300 lies in a gap; the others are rows of a padded vocabulary.
    for unknown in (300, 311, 151935, 10**12):
        ids = [a, unknown, 310, b]
        assert tokenizer.decode(ids) == "aZb"
        assert list(tokenizer.decode_stream(ids)) == ["a", "Z", "b"]
        assert tokenizer.continuation([a, unknown], [unknown, b]) == "b"
    assert tokenizer.vocab_size == 311


def test_stream_goes_on_after_an_invalid_byte():
    tokenizer = Tokenizer(sentencepiece())
    ids = [3 + byte for byte in "你".encode()] + [3 + 0xFF, *tokenizer.encode("ab")[1:]]
    text = "".join(tokenizer.decode_stream(ids))
    assert text == tokenizer.decode(ids) == "\ufffd\ufffd\ufffd\ufffdab"


def test_continuation_keeps_its_first_space():
    tokenizer = Tokenizer(sentencepiece("▁paris", "▁is"))
    prompt = tokenizer.encode("the capital is")
    new = [272, 273, 2]
    assert tokenizer.decode(new) == "paris is</s>"
    assert tokenizer.continuation(prompt, new) == " paris is"
    assert tokenizer.continuation(prompt, new, skip_special_tokens=False) == " paris is</s>"
    pieces = tokenizer.decode_stream(new, prompt=prompt, skip_special_tokens=True)
    assert list(pieces) == [" paris", " is"]
    assert tokenizer.continuation([], new) == "paris is"
    assert tokenizer.continuation(prompt, []) == ""


def test_continuation_completes_a_character_of_the_prompt():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a😀b")
    for cut, text in ((1, "😀b"), (2, "😀b"), (4, "😀b"), (5, "b")):
        assert tokenizer.continuation(ids[:cut], ids[cut:]) == text
        assert "".join(tokenizer.decode_stream(ids[cut:], prompt=ids[:cut])) == text


def shared(one, other):
    return next(
        (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y),
        min(len(one), len(other)),
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace", "pieces"])
def test_random_streams_equal_the_whole_decode(kind, skip):
    wrapped = byte_level() if kind == "byte level" else sentencepiece("▁a", "你", "\ufffd")
    if kind == "metaspace":
        wrapped.decoder = decoders.Metaspace()
    elif kind == "pieces":
        wrapped.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(wrapped)
    generator = random.Random(0)
    # Half of the ids spell or spoil a few characters; the others are any ids, known or not.
    few = [*tokenizer.encode("a 你😀é\ufffd", add_special_tokens=False), 1, 3 + 0xFF, 9999]

    def draw(number):
        return [
            generator.choice(few) if generator.random() < 0.5 else generator.randrange(280)
            for _ in range(generator.randrange(number))
        ]

    for _ in range(300):
        prompt, new = draw(10), draw(25)
        streamed = "".join(tokenizer.decode_stream(new, skip_special_tokens=skip))
        assert streamed == tokenizer.decode(new, skip_special_tokens=skip)
        whole = tokenizer.decode(prompt + new, skip_special_tokens=skip)
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
        right = whole[shared(before, whole) :]
        assert tokenizer.continuation(prompt, new, skip_special_tokens=skip) == right
        stream = tokenizer.decode_stream(new, prompt=prompt, skip_special_tokens=skip)
        assert "".join(stream) == right


def test_a_long_stream_of_invalid_bytes_decodes_few_tokens_at_a_time(monkeypatch):
    tokenizer = Tokenizer(byte_level())
    longest = 0
    decode = TextDecoder.decode

    def watched(self, ids, **options):
        nonlocal longest
        ids = list(ids)
        longest = max(longest, len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(TextDecoder, "decode", watched)
    invalid = tokenizer.encode("你")[1]
    assert "".join(tokenizer.decode_stream([invalid] * 500)) == "\ufffd" * 500
    assert longest < 20
