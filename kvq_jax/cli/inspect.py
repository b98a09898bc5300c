# SPDX-License-Identifier: Apache-2.0
"""kvq inspect: what the outlier tracer sees in a prompt, and what it keeps."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer
from rich.table import Table

from kvq_jax.cli import options, terminal

if TYPE_CHECKING:
    import numpy as np

    from kvq_jax.engines import Window
    from kvq_jax.models import Decoder


class Trace(NamedTuple):
    """What the tracer saw in a prompt of T tokens.

    Attributes:
      magnitudes: L1 norm of each key, as attention uses it, `[L, K, T]`.
      kept: positions in the outlier pool of each layer and head.
      moved: positions that were kept until a smaller key came; still in full precision.
      num_coded: tokens that have been coded, and so could be traced.
    """

    magnitudes: "np.ndarray"
    kept: list[list[list[int]]]
    moved: list[list[list[int]]]
    num_coded: int


def inspect(
    prompt: Annotated[str, typer.Argument(help="A text, @FILE, or - for stdin.")],
    model: options.Model = "smollm2",
    dtype: options.Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="Draw every layer into this PNG.")] = None,
    json: options.Json = False,
    group_size: options.GroupSize = 32,
    residual_length: options.ResidualLength = 32,
    num_outliers: options.NumOutliers = 3,
) -> None:
    """Show which tokens OTT traces in a prompt, and the key magnitudes it goes by.

    Small keys spoil the range of the group they are coded with; OTT keeps the smallest of each
    layer and head in full precision. Only tokens that get coded compete, so a prompt must be
    longer than --group-size and --residual-length together.
    """
    method = options.make_method(
        "ott",
        group_size=group_size,
        residual_length=residual_length,
        num_outliers=num_outliers,
    )
    method = cast("Window", method)
    if not num_outliers:
        raise options.UsageError("--num-outliers 0 traces nothing")
    if out is not None:  # before minutes are spent
        if out.suffix.lower() != ".png":
            raise options.UsageError(f"--out {out} must end in .png")
        if out.is_dir():
            raise IsADirectoryError(f"{out}: is a folder")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"{out}: there is no folder {out.parent}")
    if prompt == "-" or prompt.startswith("@"):
        prompt = terminal.read_text(prompt.removeprefix("@"))
    loaded = terminal.load_model(model, dtype, quiet=json)
    ids = loaded.tokenizer.encode(prompt)
    window = method.group_size + method.residual_length
    if len(ids) <= window:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and nothing is coded, or traced, before there are "
            f"{window + 1}: give a longer one, or a smaller --group-size or --residual-length"
        )
    with terminal.working("running the prompt", quiet=json):
        trace = trace_prompt(loaded.decoder, ids, method)
    if out is not None:
        draw(trace, out)
    if json:
        terminal.print_json(
            {
                "tokens": ids,
                "num_coded": trace.num_coded,
                "layers": [
                    {"layer": layer, "kept": kept, "moved": moved}
                    for layer, (kept, moved) in enumerate(zip(trace.kept, trace.moved, strict=True))
                ],
            }
        )
        return
    show(trace, [loaded.tokenizer.decode([i]) for i in ids])
    if out is not None:
        terminal.err.print(f"drawn into {out}", style="dim", markup=False)


def trace_prompt(decoder: "Decoder", ids: list[int], method: "Window") -> Trace:
    """Runs a prompt through the model, and its keys through the tracer."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kvq_jax.decoding.steps import pad, prefill
    from kvq_jax.methods import dense
    from kvq_jax.models import init_states

    padded = pad([ids])
    capacity = padded.tokens.shape[1]
    states = init_states(decoder.config, dense(), 1, capacity, decoder.dtype)
    _, states = prefill(decoder, dense(), states, padded)
    # A prompt is prefilled with exact attention, so that its keys are the same for any cache:
    # the tracer needs one compiled layer, not a model.
    empty = init_states(decoder.config, method, 1, capacity, decoder.dtype)
    add_prompt = jax.jit(method.prefill)
    magnitudes, kept, moved, num_coded = [], [], [], 0
    for dense_state, state in zip(states, empty, strict=True):
        keys, values = (x[:, :, : len(ids)] for x in (dense_state.keys, dense_state.values))
        magnitudes.append(np.asarray(jnp.abs(keys[0].astype(jnp.float32)).sum(-1)))
        state = add_prompt(state, keys.swapaxes(1, 2), values.swapaxes(1, 2))
        positions = np.asarray(state.pool.positions[0])
        num_outliers = state.pool.score.shape[-1]
        kept.append([sorted(p[p >= 0].tolist()) for p in positions[:, :num_outliers]])
        moved.append([sorted(p[p >= 0].tolist()) for p in positions[:, num_outliers:]])
        num_coded = int(state.coded.num_coded[0])
    return Trace(np.stack(magnitudes), kept, moved, num_coded)


def show(trace: Trace, pieces: list[str]) -> None:
    """Lists the traced positions of each layer and KV head, and the commonest tokens.

    Args:
      trace: of the prompt.
      pieces: text of each token.
    """
    num_layers, num_heads, length = trace.magnitudes.shape
    table = Table()
    table.add_column("layer", justify="right")
    for head in range(num_heads):
        table.add_column(f"KV head {head}")
    for layer, (kept, moved) in enumerate(zip(trace.kept, trace.moved, strict=True)):
        cells = [
            " ".join([*map(str, now), *(f"({p})" for p in before)]) or "-"
            for now, before in zip(kept, moved, strict=True)
        ]
        table.add_row(str(layer), *cells)
    terminal.out.print(table)
    terminal.out.print(
        f"Positions of the tokens kept in full precision, of {trace.num_coded} coded ones "
        f"({length} in all). In parentheses: kept until a smaller key came, and in full "
        "precision still.",
        style="dim",
    )
    counts = Counter(p for layer in trace.kept for head in layer for p in head)
    for position, count in counts.most_common(5):
        terminal.out.print(
            f"position {position} {pieces[position]!r}: kept by {count} of "
            f"{num_layers * num_heads} heads",
            markup=False,
        )


def draw(trace: Trace, path: Path) -> None:
    """Draws a panel a layer: key magnitude over position, the traced tokens marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    num_layers, num_heads, length = trace.magnitudes.shape
    columns = min(5, num_layers)
    rows = -(-num_layers // columns)
    figure = Figure(figsize=(3.4 * columns, 2.1 * rows + 1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    colors = [f"C{head % 10}" for head in range(num_heads)]
    for layer, panel in enumerate(panels):
        if layer >= num_layers:
            panel.set_visible(False)
            continue
        panel.axvspan(trace.num_coded - 0.5, length - 0.5, color="0.92", linewidth=0)
        for head, color in enumerate(colors):
            values = trace.magnitudes[layer, head]
            panel.plot(values, color=color, linewidth=0.7, alpha=0.6)
            kept, moved = trace.kept[layer][head], trace.moved[layer][head]
            panel.scatter(kept, values[kept], s=26, color=color, edgecolors="black", zorder=3)
            panel.scatter(moved, values[moved], s=22, color="white", edgecolors=color, zorder=3)
        untraced = not any(trace.kept[layer])
        panel.set_title(f"layer {layer}" + ", not traced" * untraced, fontsize=9, pad=3)
        panel.set_ylim(bottom=0)
        panel.set_xlim(-0.02 * length, length)
        panel.tick_params(labelsize=8)

    def dot(color: str, edge: str, label: str) -> Line2D:
        return Line2D(
            [], [], marker="o", linestyle="", color=color, markeredgecolor=edge, label=label
        )

    figure.legend(
        handles=[
            *(Line2D([], [], color=c, label=f"KV head {i}") for i, c in enumerate(colors)),
            dot("0.5", "black", "traced, kept"),
            dot("white", "0.5", "traced, replaced since"),
            Patch(color="0.92", label="not coded yet"),
        ],
        loc="outside upper center",
        ncols=min(num_heads + 3, 8),
        fontsize=9,
    )
    figure.supxlabel("token position", fontsize=10)
    figure.supylabel("L1 norm of the key, after rotary embedding", fontsize=10)
    figure.savefig(path, dpi=110)
