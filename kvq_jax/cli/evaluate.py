# SPDX-License-Identifier: Apache-2.0
"""kvq eval: quality of caches on a text."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvq_jax.cli import options, terminal

if TYPE_CHECKING:
    from kvq_jax.measure import Quality


def evaluate(
    textfile: Annotated[
        str, typer.Argument(help="A text, .txt or .txt.gz in UTF-8; - reads stdin.")
    ],
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    methods: Annotated[
        str, typer.Option(help="Comma-separated; kvq methods lists them.")
    ] = "dense,kivi,ott",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="How many, one after the other.")] = 6,
    skip: Annotated[
        int, typer.Option(min=0, help="First predictions of each window that are not scored.")
    ] = 128,
    json: options.Json = False,
    bits: options.Bits = None,
    value_bits: options.ValueBits = None,
    group_size: options.GroupSize = None,
    residual_length: options.ResidualLength = None,
    num_outliers: options.NumOutliers = None,
    params: options.ParamsFolder = None,
) -> None:
    """Measure how well caches predict a text, against the dense cache.

    Every token is predicted from the cache as it stood when decoding: what a method has coded
    by then is read from its codes.
    """
    caches = options.make_methods(
        [name.strip() for name in methods.split(",")],
        bits=bits,
        value_bits=value_bits,
        group_size=group_size,
        residual_length=residual_length,
        num_outliers=num_outliers,
    )
    if skip >= context - 1:
        raise options.UsageError(f"--skip {skip} leaves nothing to score of --context {context}")
    text = terminal.read_text(textfile)
    loaded = terminal.load_model(model, dtype, quiet=json)

    from kvq_jax import measure

    tokens = loaded.tokenizer.encode(text)
    if len(tokens) < context * windows:
        raise ValueError(
            f"{textfile}: {len(tokens)} tokens are too few for {windows} windows of {context}: "
            "give a longer text, or a smaller --windows or --context"
        )
    cut = measure.consecutive_windows(tokens, context, windows)
    caches, fitted = options.load_fitted(params, caches, loaded.config)
    with progress(["dense", *caches], quiet=json) as on_progress:
        qualities = measure.evaluate(
            loaded.decoder, cut, caches, skip=skip, params=fitted, on_progress=on_progress
        )
    if json:
        terminal.print_json(
            [{"method": name} | dataclasses.asdict(x) for name, x in qualities.items()]
        )
    else:
        show(qualities)


@contextlib.contextmanager
def progress(names: list[str], *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar for `measure.evaluate` on stderr, if that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=terminal.err,
        transient=True,
        disable=quiet or not terminal.err.is_terminal,
    ) as bars:
        order = list(dict.fromkeys(names))
        bar = bars.add_task(f"{order[0]} (compiling)", total=len(order))

        def on_progress(name: str, done: int, total: int) -> None:
            finished = order.index(name) + done / total
            compiling = done == total and finished < len(order)
            label = f"{order[int(finished)]} (compiling)" if compiling else name
            bars.update(bar, description=label, completed=finished)

        yield on_progress


def show(qualities: dict[str, "Quality"]) -> None:
    """Prints the figures for people."""
    table = Table()
    table.add_column("method")
    share = any(x.shared_bytes for x in qualities.values())
    for name in ("bits", *["shared"] * share, "perplexity", "kl", "kl p99", "top-1"):
        table.add_column(name, justify="right")
    for name, x in qualities.items():
        table.add_row(
            name,
            f"{x.bits_per_element:.2f}",
            *[terminal.size(x.shared_bytes) if x.shared_bytes else ""] * share,
            f"{x.perplexity:.2f}",
            f"{x.kl:.4f} ± {x.kl_stderr:.4f}",
            f"{x.kl_p99:.3f}",
            f"{x.top1:.1%}",
        )
    terminal.out.print(table)
    some = next(iter(qualities.values()))
    terminal.out.print(
        f"{some.tokens} predictions in windows of {some.context} tokens. bits: of the whole cache "
        "at that length, per key or value"
        + ("; shared: what all caches share besides" if share else "")
        + ". kl: distance of the predictions from those with the "
        "dense cache, in nats; p99: its 99th percentile. top-1: how often the likeliest token is "
        "that of the dense cache.",
        style="dim",
    )
