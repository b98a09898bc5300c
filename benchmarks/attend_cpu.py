# SPDX-License-Identifier: Apache-2.0
"""Time of decode attention on a CPU, one layer with the heads of SmolLM2 (9 on 3, 64 wide).

Several layers' caches take turns, so that none stays in the processor's own caches. All methods
take turns too: read the ratios, and the minimum rather than the median on a busy machine.

    python benchmarks/attend_cpu.py --json attend.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import kvq_jax as kvq

K, N, H = 3, 9, 64
METHODS = {"dense": kvq.dense(), "kivi": kvq.kivi(residual_length=32), "ott": kvq.ott()}


def filled(method, length: int, capacity: int, num_layers: int):
    spec = kvq.CacheSpec(1, K, capacity, H, jnp.float32)
    k, v = (jax.random.normal(jax.random.key(i), (1, length, K, H)) for i in range(2))
    state = jax.jit(method.prefill)(method.init(spec), k, v)
    return tuple(jax.tree.map(jnp.copy, state) for _ in range(num_layers))


def attend_all(method):
    def run(states, q):
        for state in states:
            q = q + 1e-3 * method.attend(state, q)  # a layer waits for the one before it
        return q

    return jax.jit(run)


def measure(length: int, capacity: int, num_layers: int, rounds: int) -> dict:
    """Microseconds a layer, minimum and median, of each method."""
    q = jax.random.normal(jax.random.key(2), (1, 1, N, H))
    runs = {
        name: (attend_all(method), filled(method, length, capacity, num_layers))
        for name, method in METHODS.items()
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
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--capacity", type=int, default=16384, help="where the length varies")
    parser.add_argument("--capacities", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--length", type=int, default=1024, help="where the capacity varies")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print("us a layer, minimum and median")
    print(f"{'length':>7} {'capacity':>9}" + "".join(f"{name:>17}" for name in METHODS))
    points = [(n, options.capacity) for n in options.lengths]
    points += [(options.length, n) for n in options.capacities]
    report = []
    for length, capacity in points:
        report.append(measure(length, capacity, options.layers, options.rounds))
        show(report[-1])
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
