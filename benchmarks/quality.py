# SPDX-License-Identifier: Apache-2.0
"""Quality of every method on real text: KL to the dense cache, perplexity, top-1, bits.

    python benchmarks/quality.py handbook.txt.gz --json benchmarks/results/quality.json
    python benchmarks/quality.py handbook.txt.gz anarchism.txt.gz --only frontier frontier-4096 \
        --json benchmarks/results/frontier.json --plot benchmarks/results/frontier.png
    python benchmarks/quality.py --json FILE --plot FILE   # draws and lists what --json holds

On a GPU, for float32 in full, and lest XLA tries many kernels for each product, minutes each:

    export JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=--xla_gpu_enable_triton_gemm=false

Any text will do; the recorded figures are of the Debian Administrator's Handbook (from Debian's
package debian-handbook, as plain text) and An Anarchist FAQ (package anarchism). Windows are the
first of the text, one after the other; the first 128 predictions of each are not scored. Bits per
element count everything, at a length of 4096 with bfloat16 for what is dense, in the plain layout
(Hopper's rounds up to 256 tokens); but what is fitted to texts and shared by all rows is told in
bytes. Suite "passkey": 24 times a number of five digits is
said in 768 tokens of text; the share of exact answers.

The rows "peer ..." check the measuring itself. They are a second, slow account of KIVI with the
windows of its authors' code (keys are coded 128 at a time, values one by one), made of dense
arrays: what others measured with those windows must come out.
"""

import argparse
import dataclasses
import gzip
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kvq_jax as kvq
from kvq_jax import measure
from kvq_jax.base import Implementation, Params
from kvq_jax.codecs import Affine, Table, symmetric
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.nonuniform import Nonuniform
from kvq_jax.codecs.tiled import WHOLE_HEAD
from kvq_jax.engines.outliers import first_tokens
from kvq_jax.methods.dense import Dense, DenseState

PEERS = {"group_size": 32, "residual_length": 128}
OWN_TEXTS = ", own texts"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--json", type=Path, help="add the figures to those there, or replace them")
    parser.add_argument("--plot", type=Path, help="draw the frontier there, of all rows of --json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--match", default="", help="only settings in whose name this regex is")
    options = parser.parse_args()
    rows = read(options.json)
    if options.texts:
        run(options, rows)
    if options.plot:
        plot(options.plot, list(rows.values()))
        print(table(list(rows.values())))


def run(options: argparse.Namespace, rows: dict[tuple, dict]) -> None:
    """Measures, adding to `rows`."""
    model = kvq.models.load(options.model)
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    fitted: dict[str, kvq.Calibration] = {}
    for path in options.texts:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            tokens = model.tokenizer.encode(file.read())
        fitted = {k: x for k, x in fitted.items() if k.endswith(OWN_TEXTS)}
        for name in options.only:
            start = time.perf_counter()
            methods = {k: v for k, v in SUITES[name][2].items() if re.search(options.match, k)}
            fit(fitted, model, tokens, methods)
            methods |= {k: fitted[k].method for k in methods if k in fitted}
            params = {setting: x.params for setting, x in fitted.items()}
            for setting, figures in measured(name, model, tokens, methods, params):
                row = {"text": path.name, "suite": name, "setting": setting} | figures | where
                rows[path.name, name, setting] = row
                print(f"{time.perf_counter() - start:4.0f} s  {line(row)}", flush=True)
                if options.json:
                    write(options.json, rows)


def measured(
    suite: str,
    model: kvq.models.LoadedModel,
    tokens: list[int],
    methods: dict[str, kvq.CacheTransform],
    params: dict[str, Params],
) -> Iterator[tuple[str, dict]]:
    """Yields the figures of each setting."""
    context, num_windows, _ = SUITES[suite]
    if suite == "passkey":
        windows, num_answered = passkeys(model.tokenizer, tokens, context, num_windows)
        for setting, method in methods.items():
            shares = measure.recall(
                model.decoder, windows, num_answered, {setting: method}, params=params
            )
            yield setting, {"context": context, "recall": shares[setting]}
        return
    windows = measure.consecutive_windows(tokens, context, num_windows)
    each = measure.evaluate_each(model.decoder, windows, methods, params=params)
    for setting, quality in each:
        figures = dataclasses.asdict(quality)
        if not setting.startswith("peer"):
            figures["bits_at_4096"] = bits_at_4096(methods[setting], model.config)
        yield setting, figures


def bits_at_4096(method: kvq.CacheTransform, config: kvq.models.DecoderConfig) -> float:
    """Returns bits per element, the same on every machine."""
    if isinstance(method, kvq.Window):
        method = dataclasses.replace(method, layout="plain")
    return measure.bits_per_element(method, config, 4096)


def line(row: dict) -> str:
    head = f"{row['text']} {row['context']:5} {row['setting']:27}"
    if "recall" in row:
        return f"{head} recall {row['recall']:.2f}"
    return (
        f"{head} {row.get('bits_at_4096', 0):6.3f} bits  ppl {row['perplexity']:6.2f}"
        f"  kl {row['kl']:.4f} ± {row['kl_stderr']:.4f}"
        f"  p99 {row['kl_p99']:.3f}  top1 {row['top1']:.3f}"
    )


def fit(
    fitted: dict[str, kvq.Calibration],
    model: kvq.models.LoadedModel,
    tokens: list[int],
    methods: dict[str, kvq.CacheTransform],
) -> None:
    """Fits what is fitted to texts to the end of the text, of which no window is measured.

    Settings whose name ends so are fitted to what the model draws itself.
    """
    tail = measure.consecutive_windows(tokens[-16384:], 1024, 16)
    missing = {k: v for k, v in methods.items() if v.needs_texts and k not in fitted}
    for texts, own in ((None, True), (tail, False)):
        if some := {k: v for k, v in missing.items() if k.endswith(OWN_TEXTS) == own}:
            fitted.update(kvq.calibrate_all(model, texts, some))


def passkeys(tokenizer, tokens: list[int], length: int, count: int) -> tuple[np.ndarray, int]:
    """Returns windows of text in which a number is said and asked for, and tokens of the answer."""
    rng = np.random.default_rng(0)
    windows = []
    for i in range(count):
        number = "".join(rng.choice(list("0123456789"), 5))
        said = tokenizer.encode(
            f" The pass key is {number}. Remember it. {number} is the pass key."
        )
        asked = tokenizer.encode("\nQuestion: What is the pass key?\nAnswer: The pass key is")
        answer = tokenizer.encode(f" {number}")
        room = length - len(said) - len(asked) - len(answer)
        start = len(tokens) // 2 + i * length
        text, at = tokens[start : start + room], round(room * (0.05 + 0.75 * i / (count - 1)))
        windows.append([*text[:at], *said, *text[at:], *asked, *answer])
        num_answered = len(answer)
    return np.array(windows, np.int32), num_answered


def plot(path: Path, rows: list[dict]) -> None:
    """Draws bits and KL of every setting, a panel for each context, and their frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["suite"] in FRONTIER and row["kl"] > 0]
    if not rows:
        raise SystemExit("nothing to draw: the suites frontier and frontier-4096 were not measured")
    contexts = sorted({row["context"] for row in rows})
    texts = list(dict.fromkeys(row["text"].split(".")[0] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(contexts), figsize=(7 * len(contexts), 6), sharey=True, squeeze=False
    )
    each = []
    for panel, context in zip(panels[0], contexts, strict=True):
        # The mean over the texts, as they are few.
        points = {}
        for row in rows:
            if row["context"] == context:
                points.setdefault(row["setting"], (row["bits_at_4096"], []))[1].append(row["kl"])
        points = {k: (bits, float(np.mean(kl))) for k, (bits, kl) in points.items()}
        each.append(points)
        best, front = np.inf, []
        for setting, (bits, kl) in sorted(points.items(), key=lambda x: x[1]):
            if kl < best:
                best = kl
                front.append((bits, kl))
            ours = setting.startswith(("recommended", "transform"))
            panel.scatter(bits, kl, color="tab:red" if ours else "tab:blue", s=18, zorder=3)
        panel.step(*zip(*front, strict=True), where="post", color="0.6", zorder=1)
        panel.set(yscale="log", title=f"context {context}", xlabel="bits per key or value")
        panel.grid(alpha=0.3)
        panel.margins(x=0.12)
    panels[0][0].set_ylabel(f"KL to the dense cache, nats, mean of {' and '.join(texts)}")
    figure.tight_layout()
    figure.canvas.draw()  # sets the scales, which names are placed by
    for panel, points in zip(panels[0], each, strict=True):
        label(panel, points)
    figure.savefig(path, dpi=120)


def label(panel, points: dict[str, tuple[float, float]]) -> None:
    """Names points, each beside itself, if it can be where no other point or name is."""
    from matplotlib.transforms import Bbox

    renderer = panel.figure.canvas.get_renderer()
    at = panel.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(*(x - 4), 8, 8) for x in at]
    for name, point in points.items():
        text = panel.annotate(name, point, textcoords="offset points", fontsize=7)
        for y, (x, side) in itertools.product((2, -7, 10, -15), ((5, "left"), (-5, "right"))):
            text.set(position=(x, y), horizontalalignment=side)
            box = text.get_window_extent(renderer)
            if not box.count_overlaps(taken):
                break
        taken.append(box)


def table(rows: list[dict]) -> str:
    """Returns the frontier in Markdown: a line for each setting, KL by context and text."""
    columns = {(row["context"], row["text"]) for row in rows if row["suite"] in FRONTIER}
    columns = sorted(columns, key=lambda x: (x[0], x[1] != rows[0]["text"]))
    settings: dict[str, dict] = {}
    for row in rows:
        if row["suite"] in (*FRONTIER, "passkey"):
            settings.setdefault(row["setting"], {})[row["context"], row["text"]] = row

    def figure(row: dict | None) -> str:
        return f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}" if row else ""

    lines = []
    for setting, figures in settings.items():
        bits = next((x["bits_at_4096"] for x in figures.values() if "bits_at_4096" in x), 0.0)
        recall = next((f"{x['recall']:.2f}" for x in figures.values() if "recall" in x), "")
        each = [figure(figures.get(column)) for column in columns]
        lines.append((bits, " | ".join(["", setting, f"{bits:.3f}", *each, recall, ""]).strip()))
    head = ["setting", "bits", *(f"{c}, {text.split('.')[0]}" for c, text in columns), "pass key"]
    rule = "|".join(["", *["---"] * len(head), ""])
    return "\n".join([" | ".join(["", *head, ""]).strip(), rule, *(x for _, x in sorted(lines))])


def read(path: Path | None) -> dict[tuple, dict]:
    """Returns the rows of an earlier run by text, suite and setting."""
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {(row["text"], row["suite"], row["setting"]): row for row in rows}


def write(path: Path, rows: dict[tuple, dict]) -> None:
    """Writes what there is; a long run that is cut off keeps its rows."""
    path.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class SimulatedKivi(Dense):
    """KIVI with its authors' windows, simulated on a dense cache.

    Attributes:
      keep: "none", or which 3 tokens of each head to leave exact: those with the "smallest" key
        (L1 norm) or the "first". Their groups are coded as if they were not exact.
      group_size: of the codes.
      residual_length: R: the last length mod R keys and the last R values are exact.
    """

    keep: str = "none"
    group_size: int = 32
    residual_length: int = 128

    def attend(
        self,
        state: DenseState,
        q: jax.Array,
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> jax.Array:
        """Scores every token twice, exact and coded, and takes what the query's window says."""
        assert sm_scale is None and sliding_window is None and implementation is None
        keys, values, num_tokens = state.keys, state.values, q.shape[1]
        slot = jnp.arange(keys.shape[2])
        kept = jnp.zeros(keys.shape[:3], bool)
        if self.keep == "first":
            kept = jnp.broadcast_to(slot < 3, kept.shape)
        if self.keep == "smallest":
            score = jnp.abs(keys).sum(-1) + jnp.where(
                slot < state.length[:, None, None], 0, jnp.inf
            )
            kept = (jax.lax.top_k(-score, 3)[1][..., None] == slot).any(-2)
        coded_keys = jnp.where(kept[..., None], keys, self._code(keys, (self.group_size, 1)))
        coded_values = jnp.where(kept[..., None], values, self._code(values, (1, self.group_size)))
        at = state.length[:, None] - num_tokens + jnp.arange(num_tokens)
        key_is_coded, value_is_coded, visible = (
            (slot < limit[..., None])[:, None, None]
            for limit in (
                at // self.residual_length * self.residual_length,
                at - self.residual_length,
                at + 1,
            )
        )
        q = q.reshape(*q.shape[:2], keys.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5
        with jax.default_matmul_precision("highest"):
            exact, coded = (jnp.einsum("btkgh,bksh->bkgts", q, x) for x in (keys, coded_keys))
            scores = jnp.where(key_is_coded, coded, exact)
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
            out = sum(
                jnp.einsum("bkgts,bksh->btkgh", jnp.where(mask, weights, 0), x)
                for mask, x in ((value_is_coded, coded_values), (~value_is_coded, values))
            )
        return out.reshape(*out.shape[:2], -1, out.shape[-1])

    def _code(self, x: jax.Array, tile: tuple[int, int]) -> jax.Array:
        """Codes and decodes whole groups; a last part of one is never asked for."""
        whole = x.shape[2] // self.group_size * self.group_size
        codec = Affine(2, tile, scale_dtype=jnp.float32)
        groups = x[:, :, :whole].reshape(*x.shape[:2], -1, self.group_size, x.shape[3])
        decoded = codec.decode(codec.encode(groups), x.dtype)
        return x.at[:, :, :whole].set(decoded.reshape(*x.shape[:2], whole, x.shape[3]))


def at_1024() -> dict[str, kvq.CacheTransform]:
    """The peers' setting, the paper's, and a table around them."""
    methods = {
        "dense": kvq.dense(),
        "peer kivi g32 r128": SimulatedKivi(),
        "peer ott3 g32 r128": SimulatedKivi("smallest"),
        "peer sink3 g32 r128": SimulatedKivi("first"),
        "kivi 4-bit g32 r128": kvq.kivi(bits=4, **PEERS),
        "ott 4-bit g32 r128": kvq.ott(bits=4, **PEERS),
        "kivi k4v2 g32 r128": kvq.kivi(bits=4, value_bits=2, **PEERS),
        "kivi k2v4 g32 r128": kvq.kivi(bits=2, value_bits=4, **PEERS),
        "ott k4v2 g32 r128": kvq.ott(bits=4, value_bits=2, **PEERS),
        "kivi 8-bit g32 r32": kvq.kivi(bits=8, group_size=32, residual_length=32),
    }
    for group, residual in ((32, 128), (32, 32), (64, 128), (64, 32), (128, 128), (128, 32)):
        sizes = {"group_size": group, "residual_length": residual}
        methods |= {
            f"kivi g{group} r{residual}": kvq.kivi(**sizes),
            f"ott g{group} r{residual}": kvq.ott(**sizes),
            f"sink4 g{group} r{residual}": kvq.sink(**sizes),
        }
    for number in (1, 2, 6, 8):
        methods[f"ott g32 r128, {number} outliers"] = kvq.ott(num_outliers=number, **PEERS)
        methods[f"ott g128 r32, {number} outliers"] = kvq.ott(num_outliers=number)
    for layers in (0, 1, 4, 8):
        methods[f"ott g32 r128, {layers} untraced"] = kvq.ott(untraced_layers=layers, **PEERS)
    return methods | {
        "ott g32 r128, l2": kvq.ott(score="l2", **PEERS),
        "ott g32 r128, shared heads": kvq.ott(share_heads=True, **PEERS),
        "ott g32 r128, 8 auxiliary": kvq.ott(num_auxiliary=8, **PEERS),
        "ott g32 r0": kvq.ott(group_size=32, residual_length=0),
    }


def at_4096() -> dict[str, kvq.CacheTransform]:
    """The whole history coded, at the peers' setting and the paper's."""
    paper = {"group_size": 128, "residual_length": 32}
    return {
        "dense": kvq.dense(),
        "peer kivi g32 r128": SimulatedKivi(),
        "peer ott3 g32 r128": SimulatedKivi("smallest"),
        "kivi 4-bit g32 r128": kvq.kivi(bits=4, **PEERS),
        "ott 4-bit g32 r128": kvq.ott(bits=4, **PEERS),
        "kivi g32 r128": kvq.kivi(**PEERS),
        "ott g32 r128": kvq.ott(**PEERS),
        "sink4 g32 r128": kvq.sink(**PEERS),
        "kivi g128 r32": kvq.kivi(**paper),
        "ott g128 r32": kvq.ott(**paper),
        "sink4 g128 r32": kvq.sink(**paper),
    }


@dataclasses.dataclass(frozen=True)
class Even(Nonuniform):
    """What KVQuant's learned levels must beat: evenly spaced ones, all else being the same."""

    weighs: bool = False

    def fit(self, sample: Sample) -> Params:
        """Returns even levels, and the ranges."""
        levels, *ranges = super().fit(sample)
        return jnp.linspace(-1, 1, levels.size)[None], *ranges


def of_papers() -> dict[str, kvq.CacheTransform]:
    """Every other method, each beside what it must beat (most tokens coded, small groups)."""
    window, none = {"group_size": 32, "residual_length": 32}, {"group_size": 32}
    absmax = Table(4, (1, WHOLE_HEAD), levels=symmetric(4))
    learned = kvq.kvquant(bits=2, **none)
    even = dataclasses.replace(learned, key_codec=Even(2, "channel"), value_codec=Even(2, "token"))
    return {
        "kivi g32 r32": kvq.kivi(**window),
        "tokennorm g32 r32": kvq.tokennorm(**window),
        "tokennorm g32 r32, traced": kvq.tokennorm(**window, tracer=kvq.OutlierTracer(score="l2")),
        "kvarn 2-bit g32 r32": kvq.kvarn(bits=2, value_bits=2, **window),
        "squat g32 r32": kvq.squat(**window),
        "kivi k3v8 g32 r32": kvq.kivi(bits=3, value_bits=8, **window),
        "svdq 2-bit g32 r32": kvq.svdq(**window),
        "svdq 2-bit g32 r32, texts": kvq.svdq(fits="texts", **window),
        "svdq 2-bit g32 r32, no sinks": kvq.svdq(num_sinks=0, **window),
        "svdq 2-bit g32 r32, texts, no sinks": kvq.svdq(fits="texts", num_sinks=0, **window),
        "absmax 4-bit": kvq.Window(absmax, absmax, group_size=32, residual_length=0),
        "nqkv 4-bit": kvq.nqkv(**none),
        "decoquant 4-bit": kvq.decoquant(**none),
        "turboquant 4-bit": kvq.turboquant(**none),
        "turboquant 2-bit": kvq.turboquant(bits=2, **none),
        "kvquant 2-bit": learned,
        "kvquant 2-bit, even levels": even,
        "kvquant 2-bit, no outliers": kvq.kvquant(bits=2, outliers=0.0, num_sinks=0, **none),
        "kvquant 3-bit": kvq.kvquant(bits=3, **none),
        "cq 4c8b": kvq.cq(channels=4, bits=8, **none),
        "cq 2c4b": kvq.cq(channels=2, bits=4, **none),
        "cq 1c2b": kvq.cq(channels=1, bits=2, **none),
        "cq 8c8b": kvq.cq(channels=8, bits=8, **none),
        "cq 4c8b, no sinks": kvq.cq(channels=4, bits=8, num_sinks=0, **none),
        "cq 2c4b, no sinks": kvq.cq(channels=2, bits=4, num_sinks=0, **none),
        "cq 1c2b, no sinks": kvq.cq(channels=1, bits=2, num_sinks=0, **none),
        "cq 8c8b, no sinks": kvq.cq(channels=8, bits=8, num_sinks=0, **none),
        "cq 8c8b r128": kvq.cq(channels=8, bits=8, group_size=32, residual_length=128),
        "transform_coding, by distance": kvq.transform_coding(weighs=False),
    }


def frontier() -> dict[str, kvq.CacheTransform]:
    """Every method as it comes, with 2 and 4 bits where it has them, and the best of each."""
    small = {"group_size": 32, "residual_length": 32}
    return {
        "dense": kvq.dense(),
        "kivi": kvq.kivi(group_size=64, residual_length=0),
        "kivi 4-bit": kvq.kivi(bits=4, group_size=64, residual_length=0),
        "ott": kvq.ott(),
        "ott g32": kvq.ott(num_auxiliary=8, **small),
        "ott 4-bit": kvq.ott(bits=4),
        "ott k4v2": kvq.ott(bits=4, value_bits=2),
        "sink": kvq.sink(),
        "nqkv": kvq.nqkv(),
        "decoquant": kvq.decoquant(),
        "squat": kvq.squat(),
        "svdq": kvq.svdq(),
        "adaquant k4v2": kvq.adaquant(),
        "turboquant 2-bit": kvq.turboquant(bits=2),
        "turboquant": kvq.turboquant(),
        "tokennorm": kvq.tokennorm(group_size=64, residual_length=0),
        "tokennorm, 1 sink": kvq.tokennorm(
            group_size=64, residual_length=0, tracer=first_tokens(1)
        ),
        "kvarn": kvq.kvarn(),
        "kvquant 2-bit": kvq.kvquant(bits=2),
        "kvquant 3-bit": kvq.kvquant(bits=3),
        "kvquant 4-bit": kvq.kvquant(bits=4),
        "cq 2c8b": kvq.cq(channels=2, bits=8),
        "cq 4c8b": kvq.cq(channels=4, bits=8),
        "cq 8c8b": kvq.cq(channels=8, bits=8),
        "transform_coding 1.25-bit" + OWN_TEXTS: kvq.transform_coding(bits=1.25),
        "transform_coding 3.5-bit" + OWN_TEXTS: kvq.transform_coding(bits=3.5),
        "recommended" + OWN_TEXTS: kvq.recommended(),
        "recommended": kvq.recommended(),
    }


FRONTIER = ("frontier", "frontier-4096")
SUITES = {
    "1024": (1024, 6, at_1024()),
    "4096": (4096, 2, at_4096()),
    "papers": (1024, 6, of_papers()),
    "frontier": (1024, 6, frontier()),
    "frontier-4096": (4096, 2, frontier()),
    "passkey": (768, 24, frontier()),
}

if __name__ == "__main__":
    main()
