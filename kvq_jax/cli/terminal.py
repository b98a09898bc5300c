# SPDX-License-Identifier: Apache-2.0
"""What goes in and out: texts, JSON, streams, progress. Results on stdout, the rest on stderr."""

import contextlib
import gzip
import json
import math
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from kvq_jax.decoding.generation import Generation
    from kvq_jax.models import LoadedModel

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


def stream(pieces: "Generator[str, None, Generation]") -> "Generation":
    """Prints the text of one prompt while it is generated.

    Args:
      pieces: from `kvq_jax.stream`.

    Returns:
      What `pieces` return.
    """
    with contextlib.closing(pieces):
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                print(flush=True)
                return end.value
            print(piece, end="", flush=True)


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
