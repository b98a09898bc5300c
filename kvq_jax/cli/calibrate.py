# SPDX-License-Identifier: Apache-2.0
"""kvq calibrate: fit methods to a text, or to what the model itself draws."""

from pathlib import Path
from typing import Annotated

import typer

from kvq_jax.cli import options, terminal


def calibrate(
    out: Annotated[Path, typer.Option(help="Folder to write; each method gets one in it.")],
    method: Annotated[
        str, typer.Option(help="Comma-separated, of those that need texts.")
    ] = "recommended",
    text: Annotated[
        str | None,
        typer.Option(
            help="A file, .txt or .txt.gz in UTF-8; - reads stdin. Without, the model draws one."
        ),
    ] = None,
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to read, or draw.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of these to fit to.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    bits: options.Bits = None,
    value_bits: options.ValueBits = None,
) -> None:
    """Fit methods to the keys and values that a text has in a model.

    For eval, generate and chat with --params. It takes minutes.
    """
    names = [name.strip() for name in method.split(",")]
    caches = options.make_methods(names, bits=bits, value_bits=value_bits)
    for name in names:
        if (out / name).exists():
            raise options.UsageError(f"{out / name} is there already: choose another --out")
    content = None if text is None else terminal.read_text(text)
    loaded = terminal.load_model(model, dtype, quiet=False)

    from kvq_jax import calibration, measure

    if content is None:
        with terminal.bar() as on_progress:
            cut = calibration.sample_texts(loaded.decoder, windows, context, seed, on_progress)
    else:
        cut = measure.consecutive_windows(loaded.tokenizer.encode(content), context, windows)
    with terminal.bar() as on_progress:
        fitted = calibration.calibrate_all(
            loaded, cut, caches, num_tokens=tokens, on_progress=on_progress
        )
    for name, one in fitted.items():
        calibration.save_calibration(out / name, one)
        terminal.err.print(f"wrote {out / name}", style="dim")
