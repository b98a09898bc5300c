# SPDX-License-Identifier: Apache-2.0
"""Measures block sizes of the Mosaic GPU kernel and keeps the best ones.

    python benchmarks/tune.py --json kernels/decode_attention/tuned/h200.json [--only NAME ...]

Tries what `block_sizes.shortlist` thinks best for the shapes of `kernel.py`, and the best of each
number of warpgroups, on random codes. Writes the fastest with the times of all; other entries of
FILE are kept.

Where the package can't be installed, from the root of a checkout:

    pip install --no-deps --no-build-isolation --target build/site . && export PYTHONPATH=build/site
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from kernel import SHAPES

import kvq_jax as kvq
from kvq_jax.base import CodedSegment, RingKV
from kvq_jax.kernels.decode_attention import block_sizes, hopper, mosaic_gpu
from kvq_jax.kernels.decode_attention.mosaic_gpu.launch import describe

CALLS, RUNS, REPEATS = 10, 10, 7  # calls of a program, runs of it that are timed together


def make(shape, method, bits):
    """Returns queries, lengths, dense and coded segment of a full cache, random."""
    spec = kvq.CacheSpec(shape.B, shape.K, shape.S, shape.H)
    state = jax.eval_shape(functools.partial(method.init, spec))
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def code(x, num_scales):
        """Random fields, and pairs of scale and minimum in as many words."""
        *lead, words = x.words.shape
        fields = jax.random.bits(next(keys), (*lead, words - num_scales), jnp.uint32)
        pairs = jax.random.uniform(next(keys), (*lead, num_scales, 2), jnp.float16, 0.1, 1.0)
        pairs = jax.lax.bitcast_convert_type(pairs, jnp.uint32)
        return hopper.TileCode(jnp.concatenate([fields, pairs], -1))

    coded = state.coded
    rows, blocks = coded.block_table.shape
    num_coded = blocks * coded.keys.words.shape[2] * method.group_size
    coded = CodedSegment(
        code(coded.keys, shape.H),
        code(coded.values, method.group_size),
        jnp.arange(rows * blocks, dtype=jnp.int32).reshape(rows, blocks),
        jnp.full(rows, num_coded, jnp.int32),
    )
    dense = [jax.random.normal(next(keys), state.keys.shape, state.keys.dtype) for _ in "kv"]
    pool = jnp.full(state.pool.positions.shape, -1, jnp.int32)
    q = jax.random.normal(next(keys), (shape.B, 1, shape.N, shape.H), state.keys.dtype)
    window = method.group_size + method.residual_length
    return q, coded.num_coded + window, RingKV(*dense, pool, coded.num_coded), coded


def compiled(arrays, method, sizes):
    """Returns a compiled chain of calls."""

    @jax.jit
    def chain(q, length, dense, coded):
        for _ in range(CALLS):  # a loop of XLA would have kernels of its own
            q = mosaic_gpu.decode_attention(
                q,
                length,
                dense,
                coded,
                method.key_codec,
                method.value_codec,
                sm_scale=q.shape[-1] ** -0.5,
                sliding_window=None,
                sizes=sizes,
            )
        return q

    return chain.lower(*arrays).compile()


def microseconds(chain, arrays) -> float:
    """Returns the median time of a call."""
    q, *cache = arrays
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(RUNS):
            q = chain(q, *cache)
        q.block_until_ready()
        times.append((time.perf_counter() - start) / (CALLS * RUNS) * 1e6)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--candidates", type=int, default=3)
    args = parser.parse_args()
    entries = {}
    if args.json.exists():
        for entry in json.loads(args.json.read_text())["entries"]:
            entries[tuple(entry["work"].values())] = entry
    for name in args.only:
        for bits in args.bits:
            method = kvq.ott(bits=bits)
            arrays = make(SHAPES[name], method, bits)
            q, _, dense, coded = arrays
            codecs = method.key_codec, method.value_codec
            work = describe(q, dense, coded, *codecs, sm_scale=1.0, sliding_window=None).work
            ranked = block_sizes.shortlist(work)
            best = {sizes.warpgroups: sizes for sizes in reversed(ranked)}  # of each kind
            tried = list(dict.fromkeys([*ranked[: args.candidates], *best.values()]))
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                compile_one = functools.partial(compiled, arrays, method)
                chains = list(pool.map(compile_one, tried))
            times = [microseconds(chain, arrays) for chain in chains]
            for sizes, us in zip(tried, times, strict=True):
                print(f"{name} {bits} bits {sizes}: {us:.1f} us", flush=True)
            fastest = min(range(len(tried)), key=times.__getitem__)
            entries[dataclasses.astuple(work)] = {
                "work": dataclasses.asdict(work),
                "sizes": dataclasses.asdict(tried[fastest]),
                "microseconds": {
                    "-".join(map(str, dataclasses.astuple(sizes))): round(us, 1)
                    for sizes, us in zip(tried, times, strict=True)
                },
            }
            device = jax.devices()[0].device_kind
            content = {"device": device, "jax": jax.__version__, "entries": list(entries.values())}
            args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
