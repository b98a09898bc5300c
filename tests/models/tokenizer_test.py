# SPDX-License-Identifier: Apache-2.0
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kvq_jax.models import Tokenizer
from kvq_jax.models.text_stream import TextDecoder
from kvq_jax.models.tokenizer import tokenizer_from_folder, tokenizer_from_gguf


def golden_strings(golden):
    return json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))


def small_vocabulary():
    """Every byte, one merge and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<s>", "</s>", *letters, "ab"]


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


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a small tokenizer."""
    vocabulary = {token: i for i, token in enumerate(small_vocabulary())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


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


def byte_level(**vocabulary):
    """A tokenizer with a token per byte, two special tokens, and further tokens by id."""
    vocabulary = {token: i for i, token in enumerate(small_vocabulary()[:-1])} | vocabulary
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def sentencepiece(*pieces):
    """A tokenizer of Llama 2's kind; byte b is id 3 + b, and the pieces come after the bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*"▁abcdehilprst", *pieces]
    vocabulary = {token: i for i, token in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


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


def test_folder_settings(folder):
    write(folder, "config.json", eos_token_id=4)
    write(folder, "generation_config.json", eos_token_id=[5, 6])
    write(
        folder,
        "tokenizer_config.json",
        eos_token={"content": "</s>"},
        bos_token="<s>",
        pad_token=None,
        chat_template="{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
    )
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.stop_ids == (1, 4, 5, 6)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages) == "<s>ab</s>"
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}", encoding="utf-8")
    assert tokenizer_from_folder(folder).apply_chat_template(messages) == "user"


def test_folder_template_by_name(folder):
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    write(folder, "tokenizer_config.json", chat_template=templates)
    assert tokenizer_from_folder(folder).apply_chat_template([]) == "d"
    write(folder, "tokenizer_config.json", chat_template=templates[:1])
    with pytest.raises(ValueError, match="no default template"):
        tokenizer_from_folder(folder)


def test_folder_refusals(folder, tmp_path):
    write(folder, "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(ValueError, match=r"'<end>' is not in tokenizer\.json"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: holds no JSON object"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not there; load_decoder\(\)"):
        tokenizer_from_folder(folder)


def with_template(source):
    return Tokenizer(tokenizers.Tokenizer(models.BPE()), chat_template=source)


def test_templates_know_what_transformers_offers():
    def render(source, **variables):
        return with_template(source).apply_chat_template([], **variables)

    assert render('{{ {"a": "<é>"} | tojson }}') == '{"a": "<é>"}'
    assert render('{{ {"a": 1} | tojson(indent=1) }}') == '{\n "a": 1\n}'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert (
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    # trim_blocks and lstrip_blocks: lines of tags leave nothing behind.
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    assert render("{{ tools is none }}{{ thinking }}", thinking=False) == "TrueFalse"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template failed"),
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "chat template failed"),
        ("{{ 1 + 'a' }}", "chat template failed"),
    ],
)
def test_template_refusals(source, message):
    with pytest.raises(ValueError, match=message):
        with_template(source).apply_chat_template([])


def test_no_template():
    with pytest.raises(ValueError, match="has no chat template"):
        with_template(None).apply_chat_template([])
