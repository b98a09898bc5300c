# SPDX-License-Identifier: Apache-2.0
"""A model of Llama 3 8B's shape on one GPU: tokens a second and memory, dense and 2-bit OTT.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end.json
    python benchmarks/end_to_end.py --json FILE --only max equal   # adds to FILE or replaces
    python benchmarks/end_to_end.py --json FILE --quick   # a tiny model: checks this script

Where the package can't be installed, from the root of a checkout:

    pip install --no-deps --target build/site . gguf && export PYTHONPATH=build/site

Weights are random, in bfloat16. Every case runs in a process of its own and is written to FILE
when it ends; one that fails is written with its error. JAX_COMPILATION_CACHE_DIR=DIR saves them
from compiling the same prefill each.

- `METHOD_CONTEXT_b1`, `_max`, `_equal`: decoding at batch 1, at the largest batch that fits, and
  OTT at dense's largest. One row is prefilled with a random prompt of CONTEXT tokens and copied to
  the others; then greedy steps are timed as `generate` runs them. A run of them is as long as a
  group of tokens, so that coding one is part of it; what counts is the median of several runs.
- `METHOD_CONTEXT_prefill`: the prefill of one row, the second time, when all is compiled.

The largest batch is what the device's memory holds next to the weights by arithmetic; while that
doesn't run, a sixteenth less. The peak is that of the process, with the prefill of one row in it;
at batch 1 that is what it shows.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

import kvq_jax as kvq
from kvq_jax.decoding.sampling import per_row
from kvq_jax.decoding.steps import (
    Drawn,
    cache_nbytes,
    drawing_step,
    pad,
    prefill,
    round_capacity,
)
from kvq_jax.models import Decoder, DecoderConfig, init_states
from kvq_jax.models.shapes import SHAPES

METHODS = {"dense": kvq.dense(), "ott": kvq.ott()}
LLAMA_3_8B = SHAPES["llama-3-8b"]
TINY = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=512,
    width=64,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=128,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
      config: of the model.
      context: tokens of the prompt.
      short: of another, at batch 1.
      long: of another, for prefill alone.
      warmup: steps that are not timed.
      steps: of a timed run.
      runs: that are timed.
      memory: bytes of the device; None asks it.
      headroom: of them for neither weights nor cache.
    """

    config: DecoderConfig = LLAMA_3_8B
    context: int = 32768
    short: int = 8192
    long: int = 131072
    warmup: int = 8
    steps: int = 128
    runs: int = 3
    memory: int | None = None
    headroom: int = 2 << 30

    @property
    def cases(self) -> dict[str, tuple[str, int, str]]:
        """Method, context and batch by name; what others refer to first."""
        cases = [("dense", self.context, "max")]
        cases += [("ott", self.context, batch) for batch in ("equal", "max")]
        cases += [(m, n, "b1") for n in (self.context, self.short) for m in METHODS]
        cases += [(m, n, "prefill") for n in (self.context, self.long) for m in METHODS]
        return {f"{m}_{tokens(n)}_{batch}": (m, n, batch) for m, n, batch in cases}


FULL = Plan()
QUICK = Plan(TINY, 256, 128, 512, warmup=2, steps=16, runs=2, memory=4 << 20, headroom=1 << 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="read what is there, write the figures")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of cases")
    parser.add_argument("--context", type=int, help="tokens of the prompt, 32768 by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--timeout", type=float, default=400, help="seconds of a case")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # runs the case here
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.context:
        plan = dataclasses.replace(plan, context=options.context)
    if options.worker:
        print(json.dumps(work(plan, *json.loads(options.worker))))
        return

    rows = {}
    if options.json and options.json.exists():
        rows = {row["name"]: row for row in json.loads(options.json.read_text())["rows"]}
    for name, case in plan.cases.items():
        if not any(part in name for part in options.only):
            continue
        dense = rows.get(f"dense_{tokens(plan.context)}_max", {})
        dense_batch = None if "error" in dense else dense.get("batch")
        rows[name] = {"name": name} | run(options, *case, dense_batch)
        print(f"{name}: {rows[name].get('error') or summary(rows[name])}", flush=True)
        report = {
            "model": dataclasses.asdict(plan.config),
            "rows": list(rows.values()),
            "ratios": ratios(plan, rows),
        }
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(plan, rows))


def run(options, method: str, context: int, batch: str, dense_batch: int | None) -> dict:
    """Runs a case in its own process, again with smaller batches if it may and has to."""
    size = {"b1": 1, "max": None, "prefill": 0, "equal": dense_batch}[batch]
    if batch == "equal" and not size:
        return {"error": "dense's largest batch is not known: run its case first"}
    failed = []
    while True:
        case = json.dumps([method, context, size])
        row = process([*sys.argv, "--worker", case], options.timeout)
        if batch != "max" or "RESOURCE_EXHAUSTED" not in row.get("error", ""):
            return row | {"failed_batches": failed}
        failed.append(row["batch"])
        size = row["batch"] - max(1, row["batch"] // 16)
        if size < 1:
            return row | {"failed_batches": failed}


def process(command: list[str], timeout: float) -> dict:
    """Returns the JSON in the last line that a Python script prints, or the error."""
    # XLA takes 75 percent of the memory unless told otherwise.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"ran for more than {timeout:.0f} seconds"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"exit code {done.returncode}: {done.stderr[-2000:]}"}


def work(plan: Plan, method: str, context: int, batch: int | None) -> dict:
    """Runs a case: a prefill for batch 0, the largest batch for None."""
    start = time.perf_counter()
    device = jax.devices()[0]
    row: dict[str, Any] = {
        "method": method,
        "context": context,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "platform": device.client.platform_version,
        },
    }
    try:
        decoder = Decoder(plan.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        row |= {"weight_bytes": kvq.nbytes(decoder), "memory_bytes": memory(plan)}
        if batch == 0:
            row |= time_prefill(decoder, METHODS[method], context)
        else:
            capacity = round_capacity(context + plan.warmup + plan.runs * plan.steps)
            if batch is None:
                batch = largest_batch(plan, decoder, METHODS[method], capacity)
            row |= {"capacity": capacity, "batch": batch}
            row |= time_decode(plan, decoder, METHODS[method], context, capacity, batch)
    except Exception as error:  # whatever it is belongs into the report
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    row["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    row["seconds"] = time.perf_counter() - start
    return row


def memory(plan: Plan) -> int:
    """Returns the bytes that arrays may take."""
    return plan.memory or jax.devices()[0].memory_stats()["bytes_limit"]


def largest_batch(plan: Plan, decoder: Decoder, method, capacity: int) -> int:
    """Returns how many rows should fit: their caches, and their logits twice."""
    row = cache_nbytes(decoder, method, 1, capacity, decoder.dtype)
    row += 2 * 4 * decoder.config.vocab_size
    return max(1, (memory(plan) - kvq.nbytes(decoder) - plan.headroom) // row)


def time_prefill(decoder: Decoder, method, context: int) -> dict:
    """Seconds of the first and the second prefill of one row."""
    seconds = [prefilled(decoder, method, context, round_capacity(context))[2] for _ in range(2)]
    cache = cache_nbytes(decoder, method, 1, round_capacity(context), decoder.dtype)
    return {"cache_bytes": cache, "first_seconds": seconds[0], "prefill_seconds": seconds[1]}


def prefilled(decoder: Decoder, method, context: int, capacity: int) -> tuple[Any, Any, float]:
    """Returns logits and states of one row with a random prompt, and the seconds it took."""
    prompt = np.random.default_rng(0).integers(decoder.config.vocab_size, size=context)
    states = init_states(decoder.config, method, 1, capacity, decoder.dtype)
    jax.block_until_ready(states)
    start = time.perf_counter()
    result = prefill(decoder, method, states, pad([prompt]))
    jax.block_until_ready(result)
    return *result, time.perf_counter() - start


def time_decode(
    plan: Plan, decoder: Decoder, method, context: int, capacity: int, batch: int
) -> dict:
    """Tokens a second of all rows together, and the bytes of their cache."""
    # The one row waits on the host: on the device it would cost a row of the batch.
    logits, row, _ = jax.device_get(prefilled(decoder, method, context, capacity))
    states = replicated(row, batch)
    del row
    first = jnp.full(batch, logits.argmax(), jnp.int32)
    drawn = Drawn(first, jnp.isfinite(logits).all(-1).repeat(batch), jnp.zeros(batch, jnp.int32))
    step = drawing_step(decoder, method, [context] * batch)
    greedy = per_row(None, 0, batch)

    def run(steps: int) -> list[float]:
        """Returns the seconds of each step."""
        nonlocal drawn, states
        times = [time.perf_counter()]
        for _ in range(steps):
            previous, (drawn, _, states) = drawn, step(states, drawn, greedy)
            if not jax.device_get(previous).finite.all():
                raise FloatingPointError("the logits are not finite")
            times.append(time.perf_counter())
        jax.device_get(drawn)
        times[-1] = time.perf_counter()
        return np.diff(times).tolist()

    warmup = run(plan.warmup)
    runs = [run(plan.steps) for _ in range(plan.runs)]
    seconds = [statistics.mean(steps) for steps in runs]
    # One step of a run codes a group; the others are the median step.
    coding = [1 - statistics.median(steps) / statistics.mean(steps) for steps in runs]
    return {
        "cache_bytes": kvq.nbytes(states),
        "tokens_per_second": batch / statistics.median(seconds),
        "step_ms": statistics.median(seconds) * 1e3,
        "step_ms_of_runs": [1e3 * x for x in seconds],
        "coding_share": statistics.median(coding),
        "steps_of_run": plan.steps,
        "warmup_seconds": sum(warmup),
    }


def replicated(row: Any, batch: int) -> Any:
    """Returns states of `batch` equal rows, made layer by layer from those of one."""
    select = jax.jit(kvq.select_rows)
    rows = jnp.zeros(batch, jnp.int32)
    return tuple(select(layer, rows) for layer in row)


def ratios(plan: Plan, rows: dict[str, dict]) -> dict[str, float]:
    """OTT's tokens a second over dense's, and dense's bytes of a row over OTT's."""
    large, short = tokens(plan.context), tokens(plan.short)
    pairs = {
        "speed at the largest batches": (f"ott_{large}_max", f"dense_{large}_max"),
        "speed at an equal batch": (f"ott_{large}_equal", f"dense_{large}_max"),
        f"speed at batch 1, {large}": (f"ott_{large}_b1", f"dense_{large}_b1"),
        f"speed at batch 1, {short}": (f"ott_{short}_b1", f"dense_{short}_b1"),
    }
    rows = {name: row for name, row in rows.items() if "error" not in row}
    result = {
        name: rows[ott]["tokens_per_second"] / rows[dense]["tokens_per_second"]
        for name, (ott, dense) in pairs.items()
        if ott in rows and dense in rows
    }
    ott, dense = (rows.get(f"{m}_{large}_b1") for m in ("ott", "dense"))
    if ott and dense:
        result["dense cache over OTT's, bytes"] = dense["cache_bytes"] / ott["cache_bytes"]
    return result


def summary(row: dict) -> str:
    if "prefill_seconds" in row:
        return f"{row['prefill_seconds']:.2f} s, peak {gigabytes(row['peak_bytes'])} GB"
    return (
        f"batch {row['batch']}, {row['tokens_per_second']:.1f} tokens/s, {row['step_ms']:.2f} ms a "
        f"step, cache {gigabytes(row['cache_bytes'])} GB, peak {gigabytes(row['peak_bytes'])} GB"
    )


def table(plan: Plan, rows: dict[str, dict]) -> str:
    """Returns all cases, those of earlier runs included, and the ratios."""
    head = ["case", "batch", "tokens/s", "ms/step", "prefill s", "cache GB", "peak GB"]
    lines = [head]
    for name, row in rows.items():
        show = functools.partial(figure, row)
        figures = [show("tokens_per_second", 1), show("step_ms", 2), show("prefill_seconds", 2)]
        sizes = [gigabytes(row.get(part)) for part in ("cache_bytes", "peak_bytes")]
        note = ["failed"] if "error" in row else []
        lines.append([name, str(row.get("batch", "")), *figures, *sizes, *note])
    text = [f"{line[0]:22}" + "".join(f"{x:>11}" for x in line[1:]) for line in lines]
    return "\n".join(text + [f"{k}: {x:.2f}x" for k, x in ratios(plan, rows).items()])


def figure(row: dict, name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else ""


def gigabytes(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 1e9:.4g}"


def tokens(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


if __name__ == "__main__":
    main()
