# SPDX-License-Identifier: Apache-2.0
"""Settings that Hugging Face keeps beside tokenizer.json, and that change token ids."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from kvq_jax.models import json_files
from kvq_jax.models.json_files import read_json, short

_NAMED_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class Settings:
    """What is written beside a tokenizer.json.

    Attributes:
      values: the settings by key.
      files: the file that each key is from.
    """

    values: dict[str, Any]
    files: dict[str, Path]

    def where(self, key: str) -> str:
        """Returns the file and the key, for error messages."""
        return f"{self.files[key]}: {key}"

    def flag(self, key: str) -> bool | None:
        """Returns a switch, None where it is not written.

        Raises:
          ValueError: it holds something else.
        """
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.where(key)} must be true or false, got {short(value)}")
        return value

    def named_tokens(self) -> dict[str, tokenizers.AddedToken]:
        """Returns `bos_token`, `eos_token` and so on, as far as they are written.

        Raises:
          ValueError: one of them is no token.
        """
        return {
            key: _token(value, self.where(key))
            for key, value in self.values.items()
            if value is not None
            and (
                key in _NAMED_TOKENS
                # Models have further ones, such as image_token.
                or (key.endswith("_token") and isinstance(value, str | dict))
            )
        }


def read_settings(folder: Path) -> Settings:
    """Reads tokenizer_config.json, and where older versions wrote the same settings.

    Raises:
      ValueError: a file is damaged.
    """
    path = folder / "tokenizer_config.json"
    values = read_optional(path)
    files = dict.fromkeys(values, path)
    # Older files leave the tokens to two more files; newer ones repeat them there.
    if "added_tokens_decoder" not in values:
        path = folder / "special_tokens_map.json"
        older = read_optional(path)
        values |= older
        files |= dict.fromkeys(older, path)
        path = folder / "added_tokens.json"
        if path.is_file():
            values["added_tokens"] = read_optional(path)
            files["added_tokens"] = path
    return Settings(values, files)


def apply_settings(tokenizer: tokenizers.Tokenizer, settings: Settings) -> tokenizers.Tokenizer:
    """Returns a tokenizer that obeys the settings.

    Args:
      tokenizer: as tokenizer.json has it; it is changed.
      settings: the settings beside it.

    Raises:
      ValueError: the settings contradict themselves or tokenizer.json.
    """
    # Left over from training; Hugging Face resets both in each call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if (flag := settings.flag("add_prefix_space")) is not None:
        tokenizer = _set_prefix_space(tokenizer, flag)
    _add_tokens(tokenizer, settings)
    tokenizer.encode_special_tokens = settings.flag("split_special_tokens") or False
    _set_begin_and_end(tokenizer, settings)
    return tokenizer


def token_ids(values: dict[str, Any], key: str, path: Path, vocab_size: int) -> list[int]:
    """Returns the token ids of a setting that holds none, one or a list.

    Args:
      values: content of a JSON file.
      key: the setting.
      path: the file.
      vocab_size: of the model; ids must be below.

    Raises:
      ValueError: it holds something else.
    """
    ids = json_files.token_ids(values, key, source=str(path))
    if any(not 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"{path}: {key} must be a token id below {vocab_size} or a list of them, "
            f"got {short(values[key])}"
        )
    return ids


def read_optional(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, empty when there is no such file.

    Raises:
      ValueError: as `read_json`.
    """
    return read_json(path) if path.exists() else {}


def _token(value: Any, where: str) -> tokenizers.AddedToken:
    """Returns the token that a setting describes by its text or by an object."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{where} must be the text of a token, got {short(value)}")
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{where} has a flag that is neither true nor false: {short(value)}")
    return tokenizers.AddedToken(value["content"], **({"special": True} | flags))


def _stated_tokens(settings: Settings) -> Iterator[tuple[str, int, tokenizers.AddedToken]]:
    """Yields the added tokens with their ids, and where they are written."""
    for key in ("added_tokens_decoder", "added_tokens"):
        stated = settings.values.get(key)
        if stated is None:
            continue
        where = settings.where(key)
        if not isinstance(stated, dict):
            raise ValueError(f"{where} must be an object, got {short(stated)}")
        for name, value in stated.items():
            if key == "added_tokens":
                token = tokenizers.AddedToken(name, special=False, normalized=True)
                i = value
            else:
                token = _token(value, f"{where}[{short(name)}]")
                # The default of an object is not that of a text.
                token.special = value.get("special", False) if isinstance(value, dict) else True
                i = int(name) if name.isdecimal() and len(name) < 20 else None
            if type(i) is not int or i < 0:
                raise ValueError(f"{where} has an id that is no number: {short({name: value})}")
            yield where, i, token


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    named = settings.named_tokens()
    special = {token.content for token in named.values()}
    more = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.values.get(key) or []
        if not isinstance(value, list | dict):
            raise ValueError(f"{settings.where(key)} must be a list of tokens, got {short(value)}")
        values = value.values() if isinstance(value, dict) else value
        more += [_token(token, settings.where(key)) for token in values]
    special |= {token.content for token in more}
    stated = sorted(_stated_tokens(settings), key=lambda entry: entry[1])
    for _, _, token in stated:
        known = there.get(token.content)
        token.special = token.special or token.content in special
        # What tokenizer_config.json says of a token wins over tokenizer.json.
        if known is None or ("added_tokens" not in settings.values and repr(known) != repr(token)):
            tokenizer.add_tokens([token])
            there[token.content] = token
    for where, i, token in stated:
        if (actual := tokenizer.token_to_id(token.content)) != i:
            raise ValueError(
                f"{where} gives {short(token.content)} the id {i}, tokenizer.json {actual}; "
                "download both again"
            )
    eos = named.get("eos_token")
    if eos is not None and tokenizer.token_to_id(eos.content) is None:
        raise ValueError(
            f"{settings.where('eos_token')} {short(eos.content)} is not in tokenizer.json"
        )
    for token in [*named.values(), *more]:
        if token.content and token.content not in there:
            token.special = True
            tokenizer.add_tokens([token])
            there[token.content] = token


def _set_begin_and_end(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    """Sets which tokens come before and after a text, if the settings say so."""
    names = ("bos", "eos")
    flags = {name: settings.flag(f"add_{name}_token") for name in names}
    if all(flag is None for flag in flags.values()):
        return
    named = settings.named_tokens()
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    template, special = ["$A:0"], []
    for name, flag in flags.items():
        token = named.get(f"{name}_token")
        i = None if token is None else tokenizer.token_to_id(token.content)
        if flag and (token is None or i is None):
            raise ValueError(f"{settings.where(f'add_{name}_token')} is true, but no {name}_token")
        if flag is None:
            # Only the other one is written: this one stays as tokenizer.json has it.
            flag = i is not None and (ids[:1] if name == "bos" else ids[-1:]) == [i]
        if flag:
            assert token is not None
            template = [f"{name}:0", *template] if name == "bos" else [*template, f"{name}:0"]
            special.append({"id": name, "ids": [i], "tokens": [token.content]})
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=special
    )


def _set_prefix_space(tokenizer: tokenizers.Tokenizer, flag: bool) -> tokenizers.Tokenizer:
    """Returns a tokenizer that puts a space before a text, or doesn't."""
    state = json.loads(tokenizer.to_str())
    before = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    for part in _parts(state["pre_tokenizer"]):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = flag
        elif part["type"] == "Metaspace" and flag is (part["prepend_scheme"] == "never"):
            part["prepend_scheme"] = "first" if flag else "never"
    if not flag:
        # Llama 2's kind has no pre-tokenizer: its normalizer writes the space.
        for part in _parts(state["normalizer"]):
            if part["type"] == "Sequence":
                part["normalizers"] = [
                    inner for inner in part["normalizers"] if inner["type"] != "Prepend"
                ]
        if (state["normalizer"] or {}).get("type") == "Prepend":
            state["normalizer"] = None
    if json.dumps([state["normalizer"], state["pre_tokenizer"]]) == before:
        return tokenizer
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields a part of a tokenizer and the parts within it."""
    if part is not None:
        yield part
        for inner in part.get("pretokenizers", []) + part.get("normalizers", []):
            yield from _parts(inner)
