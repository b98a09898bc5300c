# SPDX-License-Identifier: Apache-2.0
"""kvq chat: talk with a model."""

import sys
from typing import Annotated

import typer

from kvq_jax.cli import options, terminal

_COMMANDS = "/reset forgets the conversation, /exit ends it"


def chat(
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    method: options.Method = "ott",
    max_new_tokens: options.MaxNewTokens = 256,
    capacity: Annotated[
        int, typer.Option(min=1, help="Tokens that the whole conversation may take.")
    ] = 2048,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    bits: options.Bits = None,
    value_bits: options.ValueBits = None,
    group_size: options.GroupSize = None,
    residual_length: options.ResidualLength = None,
    num_outliers: options.NumOutliers = None,
    params: options.ParamsFolder = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = 0,
) -> None:
    """Talk with a model; the conversation is kept, /reset forgets it, /exit ends.

    Each turn runs the whole conversation through the model again, and compiles when the
    conversation has outgrown a power of two tokens: the first word may take a while.
    """
    cache = options.make_method(
        method,
        bits=bits,
        value_bits=value_bits,
        group_size=group_size,
        residual_length=residual_length,
        num_outliers=num_outliers,
    )
    sampling = options.make_sampling(temperature, top_k, top_p, min_p)
    loaded = terminal.load_model(model, dtype)
    caches, fitted = options.load_fitted(params, {method: cache}, loaded.config)

    from kvq_jax.decoding.generation import stream

    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    encode(loaded.tokenizer, [*messages, {"role": "user", "content": "?"}])  # has a template
    terminal.err.print(f"{model} with {method} cache; {_COMMANDS}", style="dim")
    while (line := read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages = list(first)
            terminal.err.print("the conversation is forgotten", style="dim")
            continue
        if line.startswith("/") and " " not in line:
            terminal.err.print(_COMMANDS, style="dim")
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        ids = encode(loaded.tokenizer, asked)
        room = capacity - len(ids) + 1
        if room < 1:
            terminal.err.print(
                f"the conversation takes {len(ids)} tokens, the cache {capacity}: /reset, or "
                "start with a larger --capacity",
                style="red",
            )
            continue

        try:
            pieces = stream(
                loaded,
                ids,
                method=caches[method],
                params=fitted.get(method),
                max_new_tokens=min(max_new_tokens, room),
                sampling=sampling,
                seed=seed + len(ids),
                capacity=capacity,
            )
            answer = terminal.stream(pieces).texts[0]
        except KeyboardInterrupt:
            break
        messages = [*asked, {"role": "assistant", "content": answer}]
    print(flush=True)


def encode(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Returns the token ids of a conversation that waits for an answer."""
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def read_line() -> str | None:
    """Returns the next line without outer white space; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
