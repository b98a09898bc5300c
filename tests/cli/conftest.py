# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kvq_jax.cli import main

LLAMA = Path(__file__).parents[1] / "models" / "golden" / "families" / "llama"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def kvq(capsys, monkeypatch):
    """Returns a function that runs `kvq` with arguments, in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments) -> Result:
        code = main([str(x) for x in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random llama of three layers (OTT traces in the third) that reads ASCII."""
    folder = tmp_path_factory.mktemp("tiny")
    config = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tensors = load_file(LLAMA / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if "layers.0." in name:
            tensors[name.replace("layers.0.", "layers.2.")] = tensor
    save_file(tensors, folder / "model.safetensors")

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 127, c))
    first = ["Ġ", "Ċ"]  # space and newline
    symbols = special + first + [c for c in alphabet if c not in first]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols[: config["vocab_size"]])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A file of 1200 ASCII characters, which are as many tokens of the tiny model."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(("The keeper wound the clockwork. " * 40)[:1200])
    return path
