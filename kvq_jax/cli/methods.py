# SPDX-License-Identifier: Apache-2.0
"""kvq methods: what there is to choose from."""

import inspect

from rich.padding import Padding
from rich.text import Text

from kvq_jax.cli import options, terminal


def methods(json: options.Json = False) -> None:
    """List the methods of keeping keys and values, with their options."""
    rows = [describe(name, function) for name, function in options.constructors().items()]
    if json:
        terminal.print_json(rows)
        return
    for row in rows:
        terminal.out.print(f"[bold]{row['method']}[/bold]  {row['title']}")
        defaults = "  ".join(f"{key}={value}" for key, value in row["defaults"].items())
        for text, style in ((row["idea"], ""), (defaults, "dim")):
            if text:
                terminal.out.print(Padding(Text(text, style), (0, 0, 0, 2)))
        terminal.out.print()


def describe(name: str, function) -> dict:
    """Returns what a method's module says of it, and the defaults of its options."""
    doc = inspect.getdoc(inspect.getmodule(function)) or ""
    title, _, rest = doc.partition("\n")
    idea = " ".join(rest.partition("Idea:")[2].partition("\n\n")[0].split())
    return {
        "method": name,
        "title": title,
        "idea": idea[:1].upper() + idea[1:],
        "defaults": {
            key: parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if not (parameter.default is None and key == "tracer")  # an object, not a value
        },
    }
