# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, and chat templates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from kvq_jax.models import chat_template as chat_templates
from kvq_jax.models import text_stream
from kvq_jax.models.json_files import check_regular, short
from kvq_jax.models.tokenizer_settings import (
    Settings,
    apply_settings,
    read_optional,
    read_settings,
    token_ids,
)

# tokenizer.ggml.pre -> how text is cut before byte-pair merges.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


class Tokenizer:
    """A tokenizer with its chat template and stop tokens.

    Attributes:
      stop_ids: tokens that end an answer.
      vocab_size: one more than the largest id, added tokens included.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
        template_source: str = "chat_template",
    ):
        """Wraps a tokenizer.

        Args:
          tokenizer: of the `tokenizers` library.
          chat_template: Jinja source, or None for a model without chat.
          special_tokens: what the template knows as `bos_token`, `eos_token` and so on.
          stop_ids: tokens that end an answer.
          template_source: the file and key of the template, for error messages.
        """
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template_source = template_source
        self._special_tokens = dict(special_tokens or {})
        self.stop_ids: tuple[int, ...] = tuple(sorted(set(stop_ids)))
        self._decoder = text_stream.TextDecoder(tokenizer)
        self.vocab_size: int = self._decoder.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: may contain special tokens such as `<|im_start|>`, which become one id.
          add_special_tokens: put the model's begin-of-text token in front, if it has one. A
            rendered chat template already contains it: pass False.
        """
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids; bytes that are no UTF-8 become U+FFFD.

        An id without a token has no text: the vocabulary of many models is padded.

        Raises:
          ValueError: an id is negative.
        """
        return self._decoder.decode(map(int, ids), skip_special=skip_special_tokens)

    def continuation(
        self, prompt: Sequence[int], new: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """Returns the text that `new` adds to a prompt.

        It is the text of the prompt and the new ids, less the text of the prompt. `decode(new)`
        may differ: many tokenizers drop the space before the first token that they decode.

        Args:
          prompt: ids of the prompt; only the last few are decoded.
          new: ids that follow it.
          skip_special_tokens: leave special tokens out of the text.

        Raises:
          ValueError: an id is negative.
        """
        context = self._decoder.context(prompt, skip_special=skip_special_tokens)
        return text_stream.after(
            self.decode(context, skip_special_tokens=skip_special_tokens),
            self.decode([*context, *new], skip_special_tokens=skip_special_tokens),
        )

    def start_stream(
        self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = False
    ) -> text_stream.TextStream:
        """Returns a stream that takes ids one at a time; see `decode_stream`.

        Args:
          prompt: ids that come before; their text is not given.
          skip_special_tokens: leave special tokens out of the text.
        """
        return text_stream.TextStream(self._decoder, prompt, skip_special=skip_special_tokens)

    def decode_stream(
        self,
        ids: Iterable[int],
        *,
        prompt: Sequence[int] = (),
        skip_special_tokens: bool = False,
    ) -> Iterator[str]:
        """Yields the text of ids as they come, never half a character.

        A character may span tokens; its text is held back until it is whole. Byte-fallback
        tokenizers hold back a run of byte tokens until it ends, since one invalid byte spoils
        all of it. The pieces joined are `decode(ids)`, or `continuation(prompt, ids)`.

        Args:
          ids: for instance a generator that decodes a model step by step.
          prompt: ids that come before; their text is not yielded.
          skip_special_tokens: leave special tokens out of the text.

        Raises:
          ValueError: an id is negative.
        """
        stream = self.start_stream(prompt, skip_special_tokens=skip_special_tokens)
        for i in ids:
            if piece := stream.push(int(i)):
                yield piece
        if rest := stream.finish():
            yield rest

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Renders a conversation as the text the model was trained on.

        Args:
          messages: each with "role" and "content".
          add_generation_prompt: end with the start of the assistant's answer.
          **variables: further variables of the template, such as `tools`.

        Returns:
          The text; encode it with `add_special_tokens=False`.

        Raises:
          ValueError: the model has no template, or the template is wrong, refuses the
            messages, or takes too much time or memory.
        """
        if self._chat_template is None:
            raise ValueError("this model has no chat template; write the prompt as plain text")
        return chat_templates.render(
            self._chat_template,
            {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                **variables,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            },
            name=self._template_source,
        )


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """Reads a Hugging Face folder's tokenizer.

    Args:
      folder: holds `tokenizer.json`, and usually `tokenizer_config.json`,
        `generation_config.json` and `chat_template.jinja`; older ones also hold
        `special_tokens_map.json` and `added_tokens.json`.

    Raises:
      FileNotFoundError: there is no `tokenizer.json`.
      ValueError: a file is damaged, or there is more than one template and none is the default.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there; load_decoder() loads a model without a tokenizer"
        )
    check_regular(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path}: not a tokenizer ({error})") from error
    settings = read_settings(folder)
    tokenizer = apply_settings(tokenizer, settings)
    named = settings.named_tokens()
    config = read_optional(folder / "config.json")
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is not int:  # load() refuses such a config
        vocab_size = 1 << 31
    _check_ids(tokenizer, vocab_size, path)
    stop_ids = [
        i
        for name in ("generation_config.json", "config.json")
        for i in token_ids(read_optional(folder / name), "eos_token_id", folder / name, vocab_size)
    ]
    if "eos_token" in named:
        eos = tokenizer.token_to_id(named["eos_token"].content)
        if eos is not None:
            stop_ids.append(eos)
    template, template_source = _read_template(folder, settings)
    return Tokenizer(
        tokenizer,
        chat_template=template,
        template_source=template_source,
        special_tokens={key: token.content for key, token in named.items()},
        stop_ids=stop_ids,
    )


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, source: str) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      metadata: the file's keys and values.
      source: name of the file, for error messages.

    Raises:
      ValueError: a kind of tokenizer that is not implemented, or one that contradicts itself.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    if get("model") != "gpt2":
        raise ValueError(f"{source}: tokenizer {get('model')!r} is not supported; supported: gpt2")
    if (pre := get("pre")) not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{source}: pre-tokenizer {pre!r} is not supported; supported: "
            f"{', '.join(_PRE_TOKENIZERS)}; load the Hugging Face folder instead"
        )
    if get("add_space_prefix", False):
        raise ValueError(f"{source}: tokenizer.ggml.add_space_prefix is not supported")
    tokens, types, merges = get("tokens"), get("token_type"), get("merges")
    if not tokens or not types or merges is None or len(tokens) != len(types):
        raise ValueError(f"{source}: tokenizer.ggml.tokens, token_type or merges missing or short")
    if odd := sorted(set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}):
        raise ValueError(f"{source}: tokenizer.ggml.token_type {odd} is not supported")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        if len(vocabulary) != len(tokens):
            raise ValueError("a token occurs twice")
        # The library aborts the process on a merge of the wrong length.
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a merge is not a pair of tokens")
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{source}: bad tokenizer ({error})") from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    ids = {
        name: get(f"{name}_token_id")
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if get(f"{name}_token_id") is not None
    }
    for name, i in ids.items():
        if type(i) is not int or not 0 <= i < len(tokens):
            raise ValueError(f"{source}: tokenizer.ggml.{name}_token_id {short(i)} is not a token")
    before = [name for name in ("bos",) if get("add_bos_token", False)]
    after = [name for name in ("eos",) if get("add_eos_token", False)]
    if missing := [name for name in before + after if name not in ids]:
        raise ValueError(f"{source}: tokenizer.ggml.{missing[0]}_token_id is missing")
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[ids[name]] for name in before]
            + ["$A"]
            + [tokens[ids[name]] for name in after],
            special_tokens=[(tokens[ids[name]], ids[name]) for name in before + after],
        )
    return Tokenizer(
        tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        template_source=f"{source}: tokenizer.chat_template",
        special_tokens={
            f"{name}_token": tokens[i] for name, i in ids.items() if name in ("bos", "eos")
        },
        stop_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
    )


def _check_ids(tokenizer: tokenizers.Tokenizer, vocab_size: int, path: Path) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token, i = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if i >= vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {i + 1} tokens, the model {vocab_size} (vocab_size in "
            f"config.json): {token[:80]!r} has the id {i}; they do not belong together"
        )


def _read_template(folder: Path, settings: Settings) -> tuple[str | None, str]:
    """Returns the chat template, and the file and key it is from."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            with path.open(encoding="utf-8") as file:
                return file.read(chat_templates.MOST_SOURCE + 1), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error
    template = settings.values.get("chat_template")
    if template is None:
        return None, ""
    where = settings.where("chat_template")
    # Older files may hold a list of named ones.
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} has no default template") from error
    if not isinstance(template, str):
        raise ValueError(f"{where} must be a text, got a {type(template).__name__}")
    return template, where
