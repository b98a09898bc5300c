# SPDX-License-Identifier: Apache-2.0
"""kvq demo: what a 2-bit cache says, takes and costs, measured while you wait."""

import time
from importlib import resources
from typing import TYPE_CHECKING

from rich.table import Table

from kvq_jax.cli import terminal
from kvq_jax.cli.evaluate import progress, show

if TYPE_CHECKING:
    from kvq_jax.base import CacheTransform
    from kvq_jax.models import Decoder, LoadedModel

# Groups of 32 tokens and a window of 64, so that most of a short text gets coded.
_LABELS = {"dense": "dense", "ott": "2-bit OTT", "default": "groups of 128"}
_QUESTION = "Tell me a short story about a lighthouse keeper."
_NEW_TOKENS = 140
_LENGTHS = (2048, 8192, 32768)
# Each size of call compiles anew: with this context the dense cache is filled in calls of one
# size, the others in calls of two.
_CONTEXT = 769


def demo() -> None:
    """Compare a 2-bit cache with a dense one: text, memory, quality. Takes a few minutes.

    Runs SmolLM2-135M-Instruct, which comes as a Python package: nothing is downloaded.
    """
    start = time.perf_counter()
    loaded = terminal.load_model("smollm2", "float32")

    import jax

    from kvq_jax.methods import dense, kivi, ott

    caches: dict[str, CacheTransform] = {
        "dense": dense(),
        "kivi": kivi(group_size=32, residual_length=32),
        "ott": ott(group_size=32, residual_length=32),
    }
    config = loaded.config
    say = terminal.out.print
    say(
        f"[bold]SmolLM2-135M-Instruct[/bold] in float32 on {jax.devices()[0].device_kind}: "
        f"{config.num_layers} layers, {config.num_kv_heads} KV heads of {config.head_dim} "
        "channels. The 2-bit caches code groups of 32 tokens and leave the latest 32 or more "
        "alone. All figures are measured now, on this machine; compiling takes most of the time.\n"
    )
    two = {name: caches[name] for name in ("dense", "ott")}
    say("[bold]1. Text[/bold]")
    show_text(loaded, two)
    say("\n[bold]2. Memory[/bold]")
    show_memory(loaded.decoder, two | {"default": ott()})
    say("\n[bold]3. Quality[/bold]")
    show_quality(loaded, caches)
    say(f"\nThat took {time.perf_counter() - start:.0f} seconds. Next:")
    for command, what in (
        ("kvq chat", "talk with it"),
        ("kvq eval FILE.txt", "quality on your text"),
        ("kvq inspect @FILE.txt --out keys.png", "the tokens that OTT keeps"),
        ("kvq --help", "all the rest"),
    ):
        say(f"  {command:<38}[dim]{what}[/dim]")


def show_text(loaded: "LoadedModel", caches: dict[str, "CacheTransform"]) -> None:
    """Answers one question with each cache, side by side."""
    from kvq_jax.base import nbytes
    from kvq_jax.decoding.generation import generate
    from kvq_jax.decoding.steps import CAPACITY_STEP

    text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": _QUESTION}])
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)
    table = Table(title=f'"{_QUESTION}"', title_justify="left", expand=True, padding=(0, 1))
    results = []
    for name, cache in caches.items():
        with terminal.working(f"compiling, then answering with the {name} cache"):
            result = generate(
                loaded, [ids], method=cache, max_new_tokens=_NEW_TOKENS, capacity=CAPACITY_STEP
            )
        results.append(result)
        table.add_column(f"{_LABELS[name]}, {terminal.size(nbytes(result.states))}", ratio=1)
    table.add_row(*(result.texts[0].strip() for result in results))
    state = results[-1].states[0]
    coded, length = int(state.coded.num_coded[0]), int(state.length[0])
    terminal.out.print(table)
    terminal.out.print(
        f"Both have room for {CAPACITY_STEP} tokens; the likeliest token is taken each time. In "
        f"the end {coded} of {length} tokens were in 2-bit codes; the latest ones, and outliers "
        "among the others, in float32.",
        style="dim",
    )


def show_memory(decoder: "Decoder", caches: dict[str, "CacheTransform"]) -> None:
    """Shows what each cache takes at some lengths, without making any."""
    import jax.numpy as jnp

    from kvq_jax.decoding.steps import cache_nbytes

    table = Table("tokens")
    for name in caches:
        table.add_column(_LABELS[name])
        if name != "dense":
            table.add_column("ratio")
    for length in _LENGTHS:
        sizes = [cache_nbytes(decoder, cache, 1, length, jnp.bfloat16) for cache in caches.values()]
        cells = [terminal.size(sizes[0])]
        for size in sizes[1:]:
            cells += [terminal.size(size), f"{sizes[0] / size:.1f}x"]
        table.add_row(f"{length:,}", *cells)
    for column in table.columns:
        column.justify = "right"
    terminal.out.print(table)
    terminal.out.print(
        "Bytes of all arrays of the cache of one sequence, with bfloat16 for what isn't coded: "
        "codes, scales, window, outlier pools. Groups of 128 are the library's default; this demo "
        "takes groups of 32, which a short text shows more of.",
        style="dim",
    )


def show_quality(loaded: "LoadedModel", caches: dict[str, "CacheTransform"]) -> None:
    """Measures the prediction of the package's own text."""
    from kvq_jax import measure

    text = resources.files("kvq_jax.cli").joinpath("demo.txt").read_text(encoding="utf-8")
    windows = measure.consecutive_windows(loaded.tokenizer.encode(text), _CONTEXT, 1)
    with progress([*caches], quiet=False) as on_progress:
        qualities = measure.evaluate(loaded.decoder, windows, caches, on_progress=on_progress)
    show(qualities)
    terminal.out.print(
        "One short text, to see the order of things; kvq eval measures yours.", style="dim"
    )
