# SPDX-License-Identifier: Apache-2.0
"""kvq calibrate: fit methods to a text, or to what the model itself draws."""

from pathlib import Path
from typing import Annotated

import typer

from kvq_jax.cli import options, terminal


def calibrate(
    out: Annotated[Path, typer.Option(help="Folder to write; each method gets one in it.")],
    textfile: Annotated[
        str | None,
        typer.Argument(
            help="A text, .txt or .txt.gz in UTF-8; - reads stdin. Without, the model draws one."
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated, of those that need texts.")
    ] = "recommended",
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

    For eval, generate and chat with --calibrations. It takes minutes for each method.
    """
    names = [name.strip() for name in methods.split(",")]
    caches = options.make_methods(names, bits=bits, value_bits=value_bits)
    text = None if textfile is None else terminal.read_text(textfile)
    loaded = terminal.load_model(model, dtype, quiet=False)

    from kvq_jax import calibration, measure

    if text is None:
        with terminal.bar() as on_progress:
            cut = calibration.sample_texts(loaded.decoder, windows, context, seed, on_progress)
    else:
        cut = measure.consecutive_windows(loaded.tokenizer.encode(text), context, windows)
    for name, method in caches.items():
        with terminal.bar() as on_progress:
            fitted = calibration.calibrate(
                loaded, cut, method, num_tokens=tokens, on_progress=on_progress
            )
        calibration.save_calibration(out / name, fitted)
        terminal.err.print(f"wrote {out / name}", style="dim")
