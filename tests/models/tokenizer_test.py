# SPDX-License-Identifier: Apache-2.0
import json
import random

import pytest

from kvq_jax.models import Tokenizer
from kvq_jax.models.tokenizer import tokenizer_from_gguf
from tests.models.vocabularies import byte_level, small_vocabulary


def golden_strings(golden):
    return json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))


def small_metadata(**changes):
    """Metadata of a GGUF file with a small tokenizer; None removes a key."""
    tokens = small_vocabulary()
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def test_smollm2_ids_and_text_equal_transformers(smollm2, golden):
    tokenizer = smollm2.tokenizer
    for case in golden_strings(golden):
        assert tokenizer.encode(case["text"]) == case["ids_default"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert tokenizer.vocab_size == 49152
    assert tokenizer.stop_ids == (2,)


def test_smollm2_digits_stand_alone(smollm2):
    # The teeth of the test above: what the gpt-2 pre-tokenizer would do instead.
    assert len(smollm2.tokenizer.encode("1234567890")) == 10


def test_smollm2_chat_equals_transformers(smollm2, golden):
    chat = json.loads((golden / "chat.json").read_text(encoding="utf-8"))
    tokenizer = smollm2.tokenizer
    assert tokenizer.apply_chat_template(chat["messages"]) == chat["rendered"]
    open_end = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=False)
    assert chat["rendered"] == open_end + "<|im_start|>assistant\n"


def test_stream_never_yields_half_a_character(smollm2, golden):
    tokenizer = smollm2.tokenizer
    for case in golden_strings(golden):
        pieces = list(tokenizer.decode_stream(case["ids"]))
        assert "".join(pieces) == case["decoded"]
        assert not any("\ufffd" in piece for piece in pieces)
    emoji = tokenizer.encode("a😀")
    stream = tokenizer.decode_stream(iter(emoji))
    assert [next(stream), next(stream)] == ["a", "😀"]


def test_stream_of_any_ids_equals_decode(smollm2):
    tokenizer = smollm2.tokenizer
    generator = random.Random(0)
    # The ids below 300 hold the single bytes, so most of these are no UTF-8.
    for upper in (300, tokenizer.vocab_size) * 20:
        ids = [generator.randrange(upper) for _ in range(30)]
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_stream_can_skip_special_tokens(smollm2):
    ids = smollm2.tokenizer.encode("hi<|im_end|>")
    assert "".join(smollm2.tokenizer.decode_stream(ids)) == "hi<|im_end|>"
    assert "".join(smollm2.tokenizer.decode_stream(ids, skip_special_tokens=True)) == "hi"
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_negative_ids_are_refused(smollm2):
    message = "token id -1 is not in the vocabulary of 49152"
    with pytest.raises(ValueError, match=message):
        smollm2.tokenizer.decode([1, -1])
    with pytest.raises(ValueError, match=message):
        list(smollm2.tokenizer.decode_stream([1, -1]))


def test_gguf_begin_and_end_tokens():
    plain = tokenizer_from_gguf(small_metadata(), source="x.gguf")
    ids = plain.encode("ab")
    assert len(ids) == 1
    both = tokenizer_from_gguf(
        small_metadata(add_bos_token=True, add_eos_token=True), source="x.gguf"
    )
    assert both.encode("ab") == [0, *ids, 1]
    assert both.encode("ab", add_special_tokens=False) == ids


@pytest.mark.parametrize(("pre", "number_of_ids"), [("smollm", 2), ("gpt-2", 1)])
def test_gguf_pre_tokenizers_cut_numbers(pre, number_of_ids):
    tokens = [*small_vocabulary(), "12"]
    metadata = small_metadata(
        pre=pre, tokens=tokens, token_type=[3, 3] + [1] * (len(tokens) - 2), merges=["1 2"]
    )
    assert len(tokenizer_from_gguf(metadata, source="x.gguf").encode("12")) == number_of_ids


def test_gguf_stop_ids():
    metadata = small_metadata(eot_token_id=5)
    assert tokenizer_from_gguf(metadata, source="x.gguf").stop_ids == (1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer 'llama' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"pre": None}, "pre-tokenizer None is not supported"),
        ({"add_space_prefix": True}, "add_space_prefix"),
        ({"merges": None}, "missing or short"),
        ({"token_type": [1]}, "missing or short"),
        ({"token_type": [6] * len(small_vocabulary())}, r"token_type \[6\]"),
        ({"tokens": ["a"] * len(small_vocabulary())}, "a token occurs twice"),
        ({"merges": ["a"]}, "a merge is not a pair"),
        ({"merges": ["a zz"]}, "bad tokenizer"),
        ({"eos_token_id": 1000}, "eos_token_id 1000 is not a token"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing"),
    ],
)
def test_gguf_refusals(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_gguf(small_metadata(**changes), source="x.gguf")
    assert "x.gguf" in str(error.value)


def test_no_template():
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(byte_level()).apply_chat_template([])
