# SPDX-License-Identifier: Apache-2.0
"""Time of decode attention of any method, one layer with the heads of SmolLM2 (9 on 3, 64 wide).

Several layers' caches take turns, so that none stays in the processor's own caches. All methods
take turns too: read the ratios, and the minimum rather than the median on a busy machine.

    python benchmarks/attend.py --json attend.json
    kvq calibrate --out FITTED   # for `recommended`; or of other methods that need texts
    python benchmarks/attend.py --methods dense,recommended,nqkv,kvarn --fitted FITTED \
        --dtype bfloat16 --batch 16 --lengths 7800 --capacity 8192 --capacities
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import kvq_jax as kvq
from kvq_jax.cli.options import load_fitted, make_methods
from kvq_jax.models.layers import rope_frequencies
from kvq_jax.models.shapes import SHAPES

K, N, H = 3, 9, 64
CONFIG = SHAPES["smollm2-135m"]
LAYER = 8  # of those that methods are fitted to


def make(names: str, fitted: Path | None) -> tuple[dict, dict]:
    """Returns methods, and parameters of those that have some."""
    methods = make_methods(names.split(","))
    if "kivi" in methods:
        methods["kivi"] = kvq.kivi(residual_length=32)  # as `ott`
    methods, params = load_fitted(fitted, methods, CONFIG)
    return methods, {name: layers[LAYER] for name, layers in params.items()}


def filled(method, params, spec: kvq.CacheSpec, length: int, num_layers: int):
    shape = (spec.batch_size, length, K, H)
    k, v = (jax.random.normal(jax.random.key(i), shape, spec.dtype) for i in range(2))
    state = method.init(spec, LAYER)
    if params is not None:
        state = method.with_params(state, params)
    state = jax.jit(method.prefill)(state, k, v)
    return tuple(jax.tree.map(jnp.copy, state) for _ in range(num_layers))


def attend_all(method):
    def run(states, q):
        for state in states:
            q = q + 1e-3 * method.attend(state, q)  # a layer waits for the one before it
        return q

    return jax.jit(run)


def measure(methods: dict, params: dict, length: int, capacity: int, options) -> dict:
    """Microseconds a layer, minimum and median, of each method."""
    dtype, num_layers, rounds = jnp.dtype(options.dtype), options.layers, options.rounds
    rope = tuple(rope_frequencies(CONFIG).tolist())
    spec = kvq.CacheSpec(options.batch, K, capacity, H, dtype, rope=rope)
    q = jax.random.normal(jax.random.key(2), (options.batch, 1, N, H), dtype)
    runs = {
        name: (attend_all(method), filled(method, params.get(name), spec, length, num_layers))
        for name, method in methods.items()
    }
    times = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, (run, states) in runs.items():
            start = time.perf_counter()
            run(states, q).block_until_ready()
            if i >= 2:
                times[name].append((time.perf_counter() - start) * 1e6 / num_layers)
    return {
        "length": length,
        "capacity": capacity,
        "us": {name: {"min": min(x), "median": statistics.median(x)} for name, x in times.items()},
    }


def show(row: dict) -> None:
    figures = "".join(f"{x['min']:9.0f} {x['median']:7.0f}" for x in row["us"].values())
    print(f"{row['length']:7d} {row['capacity']:9d}{figures}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--methods", default="dense,kivi,ott")
    parser.add_argument("--fitted", type=Path, help="folder of kvq calibrate, where it is needed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--capacity", type=int, default=16384, help="where the length varies")
    parser.add_argument("--capacities", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--length", type=int, default=1024, help="where the capacity varies")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    methods, params = make(options.methods, options.fitted)
    print("us a layer, minimum and median")
    print(f"{'length':>7} {'capacity':>9}" + "".join(f"{name:>17}" for name in methods))
    points = [(n, options.capacity) for n in options.lengths]
    points += [(options.length, n) for n in options.capacities]
    report = []
    for length, capacity in points:
        report.append(measure(methods, params, length, capacity, options))
        show(report[-1])
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
