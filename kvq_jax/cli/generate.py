# SPDX-License-Identifier: Apache-2.0
"""kvq generate: continue a prompt."""

import math
from typing import Annotated, Any

import typer

from kvq_jax.cli import options, terminal


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads stdin.")],
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    method: options.Method = "ott",
    max_new_tokens: options.MaxNewTokens = 64,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Tokens the cache can hold; default: as needed.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; give it several times for several texts."),
    ] = None,
    json: options.Json = False,
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
    """Continue a prompt, with the keys and values kept by any method.

    The text goes to stdout as it comes, the figures to stderr.
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
    text = terminal.read_text("-") if prompt == "-" else prompt
    loaded = terminal.load_model(model, dtype, quiet=json)
    tokenizer = loaded.tokenizer
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids = tokenizer.encode(text, add_special_tokens=not chat)
    if not ids:
        raise ValueError("the prompt has no tokens")
    caches, fitted = options.load_fitted(params, {method: cache}, loaded.config)

    from kvq_jax.base import nbytes
    from kvq_jax.decoding import generation as decoding
    from kvq_jax.decoding.steps import cache_nbytes, round_capacity
    from kvq_jax.methods import dense

    if capacity is None:
        # As `generate` does; said here because the dense cache is compared at this capacity.
        capacity = round_capacity(len(ids) + max_new_tokens - 1)

    settings: dict[str, Any] = {
        "method": caches[method],
        "params": fitted.get(method),
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "seed": seed,
        "stop_strings": stop,
        "capacity": capacity,
    }
    if json:
        generation = decoding.generate(loaded, ids, **settings)
    else:
        generation = terminal.stream(decoding.stream(loaded, ids, **settings))
    figures = {
        "text": generation.texts[0],
        "tokens": generation.tokens[0],
        "tokens_per_second": generation.tokens_per_second,
        "cache_bytes": nbytes(generation.states),
        "dense_cache_bytes": cache_nbytes(
            loaded.decoder, dense(), 1, capacity, loaded.decoder.dtype
        ),
    }
    if json:
        terminal.print_json(figures)
        return
    parts = [f"{len(figures['tokens'])} tokens"]
    if math.isfinite(figures["tokens_per_second"]):
        parts.append(f"{figures['tokens_per_second']:.1f} a second")
    parts.append(f"{method} cache {terminal.size(figures['cache_bytes'])}")
    if method != "dense":
        parts.append(f"dense would be {terminal.size(figures['dense_cache_bytes'])}")
    terminal.err.print(", ".join(parts) + f" ({capacity} tokens, {dtype})", style="dim")
