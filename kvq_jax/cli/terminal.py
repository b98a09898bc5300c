# SPDX-License-Identifier: Apache-2.0
"""What goes in and out: texts, JSON, streams, progress. Results on stdout, the rest on stderr."""

import contextlib
import gzip
import json
import math
import queue
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from kvq_jax.decoding.generation import Generation
    from kvq_jax.models import LoadedModel, Tokenizer

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Prints a value as JSON; a number that JSON lacks, such as NaN, becomes null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(num_bytes: int) -> str:
    """Returns a number of bytes for people, such as "3.1 MiB"."""
    value = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def read_text(path: str) -> str:
    """Returns the text of a file, unpacked if its name ends in .gz; "-" reads stdin.

    Raises:
      OSError: it can't be read.
      ValueError: it isn't UTF-8, or it is empty.
    """
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    name = "stdin" if path == "-" else path
    if path.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{name}: not a whole gzip file ({error})") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error})") from error
    if not text.strip():
        raise ValueError(f"{name}: there is no text in it")
    return text


def load_model(name: str, dtype: str, *, quiet: bool = False) -> "LoadedModel":
    """Loads a model, saying so on a terminal."""
    with working(f"loading {name}", quiet=quiet):
        from kvq_jax.models import load

        return load(name, dtype=dtype)


@contextlib.contextmanager
def working(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Shows on a terminal that something is under way."""
    if quiet or not err.is_terminal:
        yield
        return
    with err.status(f"{text} ..."):
        yield


def stream(tokenizer: "Tokenizer", run: Callable[[Callable], "Generation"]) -> "Generation":
    """Prints the text of row 0 while it is generated, whole characters only.

    Args:
      tokenizer: of the model.
      run: calls `generate` with the `on_tokens` that it is given.
    """
    tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def show() -> None:
        for piece in tokenizer.decode_stream(iter(tokens.get, None), skip_special_tokens=True):
            print(piece, end="", flush=True)

    # `generate` pushes tokens, `decode_stream` pulls them: hence a thread. It is the one that
    # prints, so that Ctrl-C reaches the one that computes.
    with ThreadPoolExecutor(1) as pool:
        printer = pool.submit(show)

        def on_tokens(new) -> None:
            if printer.done():
                printer.result()  # raises what stopped it, such as a closed pipe
            tokens.put(int(new[0]))

        try:
            generation = run(on_tokens)
        finally:
            tokens.put(None)
        printer.result()
    print(flush=True)
    return generation


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar for `calibrate` on stderr, if that is a terminal."""
    from rich.progress import Progress

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks = {}

        def on_progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=done, total=total)

        yield on_progress
