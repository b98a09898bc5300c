# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers for tests."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers


def small_vocabulary():
    """Every byte, one merge and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<s>", "</s>", *letters, "ab"]


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
