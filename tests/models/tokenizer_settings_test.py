# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from kvq_jax.models.tokenizer import tokenizer_from_folder
from tests.models.vocabularies import sentencepiece, small_vocabulary


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


@pytest.mark.parametrize("saved", ["truncation", "padding"])
def test_truncation_and_padding_of_training_are_reset(folder, saved):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    right = tokenizer.encode("a long text").ids
    if saved == "truncation":
        tokenizer.enable_truncation(max_length=4)
    else:
        tokenizer.enable_padding(length=64, pad_id=0, pad_token="<s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer_from_folder(folder).encode("a long text") == right


def add_template(folder, single):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("single", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("bos", "eos"), [(b, e) for b in (True, False, None) for e in (True, False, None)]
)
def test_begin_and_end_tokens_of_the_settings_win(folder, name, single, bos, eos):
    if single:
        add_template(folder, single)
    ids = tokenizer_from_folder(folder).encode("xyz", add_special_tokens=False)
    write(folder, name, bos_token="<s>", eos_token="</s>", add_bos_token=bos, add_eos_token=eos)
    tokenizer = tokenizer_from_folder(folder)
    # What is not written stays as tokenizer.json has it.
    before = [0] if bos or (bos is None and single) else []
    after = [1] if eos or (eos is None and single == "<s> $A </s>") else []
    assert tokenizer.encode("xyz") == [*before, *ids, *after]
    assert tokenizer.encode("xyz", add_special_tokens=False) == ids


def test_added_tokens_of_the_settings(folder):
    size = tokenizer_from_folder(folder).vocab_size
    stated = {str(size): {"content": "<call>", "special": True}, "1": {"content": "</s>"}}
    write(folder, "tokenizer_config.json", added_tokens_decoder=stated, pad_token="<pad>")
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.encode("<call><pad></s>") == [size, size + 1, 1]
    # The settings say that </s> isn't special.
    text = tokenizer.decode([size, 1, size + 1], skip_special_tokens=True)
    assert text == "</s>"
    write(folder, "tokenizer_config.json", additional_special_tokens=["<call>"])
    write(folder, "added_tokens.json", **{"<call>": size, "word": size + 1})
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.encode("<call>word") == [size, size + 1]
    assert tokenizer.decode([size, size + 1], skip_special_tokens=True) == "word"


def test_settings_that_cut_text_in_another_way(folder):
    plain = tokenizer_from_folder(folder).encode("b")
    write(folder, "tokenizer_config.json", add_prefix_space=True)
    assert tokenizer_from_folder(folder).decode(plain) == "b"
    spaced = tokenizer_from_folder(folder).encode("b")
    assert spaced[1:] == plain
    assert tokenizer_from_folder(folder).decode(spaced) == " b"
    write(folder, "tokenizer_config.json", split_special_tokens=True)
    assert len(tokenizer_from_folder(folder).encode("<s>")) == 3


def test_a_prefix_space_of_llama_2_can_be_switched_off(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    with_space = tokenizer_from_folder(tmp_path).encode("a")
    write(tmp_path, "tokenizer_config.json", add_prefix_space=False)
    assert tokenizer_from_folder(tmp_path).encode("a") == with_space[1:]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "eos_token_id", "2"),
        ("config.json", "eos_token_id", True),
        ("config.json", "eos_token_id", -1),
        ("config.json", "eos_token_id", 10**399),
        ("generation_config.json", "eos_token_id", [1, None]),
        ("generation_config.json", "eos_token_id", {"a": 1}),
        ("tokenizer_config.json", "eos_token", 7),
        ("tokenizer_config.json", "eos_token", {"text": "</s>"}),
        ("tokenizer_config.json", "eos_token", {"content": 5}),
        ("tokenizer_config.json", "bos_token", {"content": "<s>", "lstrip": "yes"}),
        ("tokenizer_config.json", "eos_token", "x" * 10**6),
        ("tokenizer_config.json", "add_bos_token", "yes"),
        ("tokenizer_config.json", "add_bos_token", True),
        ("tokenizer_config.json", "added_tokens_decoder", [1]),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "y"}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"9" * 400: {"content": "y"}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"0": {"content": "</s>"}}),
        ("tokenizer_config.json", "additional_special_tokens", 5),
        ("tokenizer_config.json", "additional_special_tokens", [5]),
        ("tokenizer_config.json", "chat_template", 5),
        ("tokenizer_config.json", "chat_template", [5]),
        ("special_tokens_map.json", "eos_token", []),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_by_file_and_key(folder, name, key, value):
    write(folder, name, **{key: value})
    with pytest.raises(ValueError) as error:
        tokenizer_from_folder(folder)
    assert f"{folder / name}: {key}" in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ['{"a": ' + "[" * 10**5, '{"a": ' + "9" * 10**5 + "}"])
def test_json_that_is_too_much_is_refused_by_file(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        tokenizer_from_folder(folder)
    assert len(str(error.value)) < 600


def test_ids_beyond_the_vocabulary_are_refused(folder):
    size = tokenizer_from_folder(folder).vocab_size
    write(folder, "config.json", vocab_size=size)
    assert tokenizer_from_folder(folder).vocab_size == size
    write(folder, "config.json", vocab_size=size, eos_token_id=size)
    with pytest.raises(ValueError, match=rf"config\.json: eos_token_id must be .* below {size}"):
        tokenizer_from_folder(folder)
    write(folder, "config.json", vocab_size=size - 1)
    message = rf"tokenizer\.json: .*vocab_size in config\.json.*'ab' has the id {size - 1}"
    with pytest.raises(ValueError, match=message):
        tokenizer_from_folder(folder)


def test_a_template_error_names_the_file(folder):
    write(folder, "tokenizer_config.json", chat_template="{{ 1/0 }}")
    message = r"tokenizer_config\.json: chat_template: .* division by zero"
    with pytest.raises(ValueError, match=message):
        tokenizer_from_folder(folder).apply_chat_template([])
    (folder / "chat_template.jinja").write_text("{{ 1/0 }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: .* division by zero"):
        tokenizer_from_folder(folder).apply_chat_template([])
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        tokenizer_from_folder(folder)
