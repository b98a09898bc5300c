# SPDX-License-Identifier: Apache-2.0
"""Where rows end: stop tokens, stop strings, and what is held back for them."""

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kvq_jax.decoding.stopping import Row, stop_sets, stop_texts
from kvq_jax.models import Tokenizer


def byte_level():
    """One token a byte."""
    vocab = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return Tokenizer(plain)


def sentencepiece():
    """Words with their space, and bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "c"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    plain = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    plain.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return Tokenizer(plain), vocab


def run(row, ids):
    """Returns the pieces of a row that is given ids until it ends."""
    pieces = []
    for i in ids:
        if row.done:
            break
        pieces.append(row.add(i))
    return pieces


@pytest.mark.parametrize(
    "stop_tokens, sets",
    [
        ((), [set(), set()]),
        (5, [{5}, {5}]),
        (np.int64(5), [{5}, {5}]),
        (jnp.array(5), [{5}, {5}]),
        ([5, 6], [{5, 6}, {5, 6}]),
        ({5, 6}, [{5, 6}, {5, 6}]),
        (np.array([5, 6]), [{5, 6}, {5, 6}]),
        (jnp.array([5, 6]), [{5, 6}, {5, 6}]),
        ([np.int64(5)], [{5}, {5}]),
        (np.array([], int), [set(), set()]),
        ([[5], ()], [{5}, set()]),
        (np.array([[5, 6], [7, 8]]), [{5, 6}, {7, 8}]),
        ([{5}, np.array([6])], [{5}, {6}]),
        ([5, [6]], [{5}, {6}]),
    ],
)
def test_stop_tokens_as_people_write_them(stop_tokens, sets, as_users_run_it):
    assert stop_sets(stop_tokens, 2) == sets


@pytest.mark.parametrize(
    "stop_tokens, message",
    [
        ("\n", r"stop_tokens takes token ids, got the text '\\n': pass it as stop_strings"),
        (["\n"], "stop_tokens takes token ids"),
        ([[5], ["\n"]], "stop_tokens takes token ids"),
        ([5, "\n"], "stop_tokens takes token ids"),
        (5.0, r"a stop token must be a token id, got 5\.0"),
        ([True], "a stop token must be a token id, got True"),
        ([None], "a stop token must be a token id, got None"),
        ([[[5]], [6]], r"a stop token must be a token id, got \(5,\)"),
        ([[5]], "1 lists of stop tokens for 2 prompts"),
    ],
)
def test_what_is_no_stop_token_is_refused(stop_tokens, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        stop_sets(stop_tokens, 2)


@pytest.mark.parametrize(
    "stops, pieces",
    [
        ([], [*"one two three"]),
        (["two"], ["o", "n", "e", " ", "", "", ""]),
        (["twice"], ["o", "n", "e", " ", "", "", "two", " ", "", "th", "r", "e", "e"]),
        ([" three", "e t"], ["o", "n", "", "", ""]),
        (["o", "one"], [""]),
        (["eek"], ["o", "n", "", "e ", "t", "w", "o", " ", "t", "h", "r", "", "ee"]),
        (["ee"], ["o", "n", "", "e ", "t", "w", "o", " ", "t", "h", "r", "", ""]),
        (["a" * 10**6, "th"], ["o", "n", "e", " ", "", "tw", "o", " ", "", ""]),
    ],
)
def test_text_is_held_back_until_it_is_decided(stops, pieces):
    tokenizer, text = byte_level(), "one two three"
    row = Row([1], tokenizer, len(text), frozenset(), stops, streams=True)
    assert run(row, tokenizer.encode(text)) == pieces
    assert row.done
    assert row.text() == "".join(pieces)
    assert len(row.tokens) == len(pieces)


def test_stop_strings_are_those_of_the_whole_text():
    """Random texts and stop strings of few letters, against a search in the whole text."""
    rng, tokenizer = np.random.default_rng(0), byte_level()
    for _ in range(300):
        text = "".join(rng.choice([*"aabé"], 20))
        stops = ["".join(rng.choice([*"aabé"], rng.integers(2, 5))) for _ in range(2)]
        row = Row([], tokenizer, 100, frozenset(), stops, streams=False)
        ids = tokenizer.encode(text)
        run(row, ids)
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        if ends:
            shown = text[: min(ends)]
            cut = min(shown.index(stop) for stop in stops if stop in shown)
            assert row.done
            assert row.text() == text[:cut]
            assert tokenizer.decode(row.tokens) == shown
        else:
            assert not row.done
            assert row.tokens == ids


def test_a_byte_token_ends_a_stop_string_at_once():
    """Though the stream waits for the bytes after it."""
    tokenizer, vocab = sentencepiece()
    row = Row([vocab["▁a"]], tokenizer, 100, frozenset(), ["\n"], streams=True)
    pieces = run(row, [vocab[x] for x in ("▁a", "c", "<0x0A>", "▁b")])
    assert pieces == [" a", "c", ""]
    assert row.text() == " ac"


def test_a_row_ends_with_its_whole_text():
    """What was held back comes with the last token."""
    tokenizer = byte_level()
    ids = tokenizer.encode("ab é")
    row = Row([], tokenizer, 4, frozenset(), ["b z"], streams=True)
    assert run(row, ids) == ["a", "", "", "b \ufffd"]
    stopped = Row([], tokenizer, 9, frozenset(ids[1:2]), ["bc"], streams=True)
    assert run(stopped, ids) == ["a", "b"]
    assert stopped.text() == "ab"


@pytest.mark.parametrize(
    "stop_strings, texts",
    [
        (None, [(), ()]),
        ((), [(), ()]),
        ("ab", [("ab",), ("ab",)]),
        (["ab", "c"], [("ab", "c"), ("ab", "c")]),
        ([["ab"], []], [("ab",), ()]),
        ([("ab", "c"), "d"], [("ab", "c"), ("d",)]),
    ],
)
def test_stop_strings_as_people_write_them(stop_strings, texts, as_users_run_it):
    assert stop_texts(stop_strings, 2) == texts


@pytest.mark.parametrize(
    "stop_strings, message",
    [
        ("", "a stop string must not be empty"),
        (["a", ""], "a stop string must not be empty"),
        ([5, 6], "a stop string must be a text, got 5"),
        (5, "a stop string must be a text, got 5"),
        ([["a"], [None]], "a stop string must be a text, got None"),
        ([["a"]], "1 lists of stop strings for 2 prompts"),
        (b"ab", "a stop string must be a text, got 97"),
    ],
)
def test_what_is_no_stop_string_is_refused(stop_strings, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        stop_texts(stop_strings, 2)
