# SPDX-License-Identifier: Apache-2.0
"""kvq calibrate: fit methods to a text, or to self-generated text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq_jax.cli import options, terminal

if TYPE_CHECKING:
    import numpy as np

    from kvq_jax.models import LoadedModel


def calibrate(
    out: Annotated[Path, typer.Option(help="Folder to write; each method gets one in it.")],
    method: Annotated[
        str, typer.Option(help="Comma-separated names of methods that need calibration.")
    ] = "recommended",
    text: Annotated[
        str | None,
        typer.Option(
            help="A file, .txt or .txt.gz in UTF-8; - reads stdin. "
            "Without, the model generates a text."
        ),
    ] = None,
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to read.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of these to fit to.")] = 8192,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of self-generated text and of the tokens.")
    ] = 0,
    bits: options.Bits = None,
    value_bits: options.ValueBits = None,
) -> None:
    """Fit methods to the keys and values of a text in a model.

    For eval, generate and chat with --params. It takes minutes.
    """
    names = [name.strip() for name in method.split(",")]
    for name in names:
        if names.count(name) > 1:
            raise options.UsageError(f"--method names {name} twice")
    caches = options.make_methods(names, bits=bits, value_bits=value_bits)
    for name, cache in caches.items():
        if not cache.needs_texts:
            raise options.UsageError(f"{name} needs no calibration: use it as it is")
        if (out / name).exists():
            raise options.UsageError(f"{out / name} is there already: choose another --out")
    content = None if text is None else terminal.read_text(text)

    from kvq_jax.fitting import store
    from kvq_jax.fitting.fit import calibrate_each

    for name in names:
        store.check_new(out / name)
    loaded = terminal.load_model(model, dtype, quiet=False)
    with terminal.bar() as on_progress:
        if content is None:
            from kvq_jax.fitting.texts import sample_texts

            cut = sample_texts(loaded.decoder, windows, context, seed, on_progress)
        else:
            cut = _cut(loaded, content, windows, context)
        for name, fitted in calibrate_each(
            loaded, cut, caches, num_tokens=tokens, seed=seed, on_progress=on_progress
        ):
            store.save_calibration(out / name, fitted)
            terminal.err.print(f"wrote {out / name}", style="dim")


def _cut(loaded: "LoadedModel", text: str, windows: int, context: int) -> "np.ndarray":
    from kvq_jax import measure

    ids = loaded.tokenizer.encode(text)
    if len(ids) < windows * context:
        raise options.UsageError(
            f"--text has {len(ids)} tokens, and {windows} windows of {context} need "
            f"{windows * context}: give fewer --windows or a smaller --context"
        )
    return measure.consecutive_windows(ids, context, windows)
