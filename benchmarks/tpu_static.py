# SPDX-License-Identifier: Apache-2.0
"""What TPUs would do, as their own compiler foretells it: nothing here has run on a TPU.

    python benchmarks/tpu_static.py --json benchmarks/results/tpu_static.json

Needs libtpu (pip install -e '.[aot]') and no TPU. Cycles are libtpu's simulation of the kernel's
schedule, of the whole launch at 32k tokens with the dense segment, and of what one more tile of
128 tokens and channels, keys and values, adds to it. The simulation does not know that copies
share the memory's bandwidth; so against it stands what the memory takes to read the bytes, and the
larger of the two counts. The baseline is the same kernel on a cache without codes.

--memory compiles whole decode steps, a minute or two each, and tells what they take.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

import kvq_jax as kvq
from kvq_jax import aot, fits
from kvq_jax.base import CodedSegment, RingKV, nbytes
from kvq_jax.codecs import Affine
from kvq_jax.kernels.decode_attention.mosaic_tpu import launch, program
from kvq_jax.models.shapes import SHAPES

# Bytes and cycles a second: published bandwidth; clocks that follow from published peaks.
CHIPS = {"v5e": (819e9, 1.5e9), "v6e": (1640e9, 1.75e9)}
TOKENS = 32768
TILE = 128 * 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one launch. No bits are a cache without codes."""

    bits: tuple[int, int] | None
    batch_size: int = 1
    num_kv_heads: int = 8
    num_queries: int = 4
    head_dim: int = 128
    num_tokens: int = 1
    group_size: int = 128
    channels: int | None = None  # of a value scale; None for all

    @property
    def codecs(self):
        """Of keys and values."""
        if not self.bits:
            return None, None
        channels = self.channels or self.head_dim
        return Affine(self.bits[0], (self.group_size, 1)), Affine(self.bits[1], (1, channels))

    @property
    def pairs_a_token(self) -> float:
        """Tiles of keys and of values."""
        return self.batch_size * self.num_kv_heads * self.head_dim / TILE

    @property
    def bytes_a_token(self) -> float:
        """Codes and scales, or dense keys and values."""
        channels = self.batch_size * self.num_kv_heads * self.head_dim
        if not self.bits:
            return 4 * channels
        scales = 4 / self.group_size + 4 / (self.channels or self.head_dim)
        return channels * (sum(self.bits) / 8 + scales)


SHAPES_OF_KERNEL = [
    Shape((2, 2)),
    Shape((4, 4)),
    Shape((4, 2)),
    Shape((8, 8)),
    Shape((2, 2), batch_size=8),
    Shape((4, 4), batch_size=8),
    Shape((2, 2), num_queries=1, num_kv_heads=32),
    Shape((2, 2), num_queries=8),
    Shape((2, 2), num_tokens=4),
    Shape((2, 2), head_dim=64),
    Shape((2, 2), head_dim=256, num_queries=2, num_kv_heads=4),
    Shape((2, 2), group_size=32),
    Shape((2, 2), channels=32),
]
QUICK = [Shape((2, 2)), Shape((4, 4))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="two shapes, no memory")
    parser.add_argument("--memory", action="store_true", help="only what decode steps take")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    options = parser.parse_args()
    report = {"jax": jax.__version__, "libtpu": version(), "kernel": [], "memory": []}

    def add(part: str, row: dict) -> None:
        report[part].append(row)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    if not options.memory:
        for chip in options.chips:
            base = baseline(chip)
            for shape in QUICK if options.quick else SHAPES_OF_KERNEL:
                add("kernel", kernel(chip, shape, base))
    if not options.quick:
        for row in memory():
            add("memory", row)


def version() -> str:
    import libtpu

    return libtpu.__version__


def baseline(chip: str) -> dict:
    """Simulates the kernel on a dense cache, of one head: with more the simulation dies."""
    _, pair = tile_pair(chip, Shape(None, num_kv_heads=1))
    print(
        f"{chip} bf16: a tile pair {pair['simulated']:.1f} cycles simulated,"
        f" {pair['memory']:.1f} of memory"
    )
    return pair


def tile_pair(chip: str, shape: Shape) -> tuple[aot.Schedule, dict]:
    """Simulates a launch, and what one more tile of keys and values adds to it."""
    whole, twice = (simulate(chip, shape, n) for n in (TOKENS, 2 * TOKENS))
    bandwidth, clock = CHIPS[chip]
    return whole, {
        "simulated": (twice.cycles - whole.cycles) / (shape.pairs_a_token * TOKENS),
        "memory": shape.bytes_a_token / shape.pairs_a_token / bandwidth * clock,
    }


def kernel(chip: str, shape: Shape, base: dict) -> dict:
    """Returns the figures of one shape."""
    row = {"chip": chip} | dataclasses.asdict(shape)
    try:
        whole, pair = tile_pair(chip, shape)
    except aot.CompileError as error:
        reason = str(error).splitlines()[-1]
        print(f"{chip} {shape}: not simulated: {reason[:160]}")
        return row | {"error": reason}
    pairs = shape.pairs_a_token * TOKENS
    unit = max(whole.uses, key=lambda name: whole.uses[name] / whole.capacity[name])
    row |= {
        "bundles": whole.bundles,
        "busiest_unit": unit,
        "pair_simulated": pair["simulated"],
        "pair_memory": pair["memory"],
        "pair_ratio_to_bf16": max(base.values()) / max(pair.values()),
        "whole_simulated": whole.cycles,
        "whole_memory": pairs * pair["memory"],
        "whole_ratio_to_bf16": pairs
        * max(base.values())
        / max(whole.cycles, pairs * pair["memory"]),
    }
    print(
        f"{chip} bits {shape.bits} B {shape.batch_size} K {shape.num_kv_heads}"
        f" G {shape.num_queries} H {shape.head_dim} T {shape.num_tokens} groups of"
        f" {shape.group_size}, {shape.channels or shape.head_dim}: {whole.bundles} bundles; a tile"
        f" pair {pair['simulated']:.1f} cycles, {pair['memory']:.1f} of memory,"
        f" {row['pair_ratio_to_bf16']:.2f}x of bf16; whole {whole.cycles},"
        f" {row['whole_ratio_to_bf16']:.2f}x",
        flush=True,
    )
    return row


def simulate(chip: str, shape: Shape, num_tokens: int) -> aot.Schedule:
    """Returns what is foretold of a launch, its arrays in the device's memory."""
    arrays = jax.eval_shape(functools.partial(make_arrays, shape, num_tokens))
    return aot.simulate(
        chip, functools.partial(run, shape, num_tokens), *arrays, kernel="decode_attention"
    )


def make_arrays(shape: Shape, num_tokens: int):
    """Returns what the launch takes."""
    return prepare(shape, num_tokens)[1:]


def run(shape: Shape, num_tokens: int, scalars, arrays):
    """Launches the kernel as if every block were full, which the simulation can't know."""
    program.occupied = lambda p, tokens: p.tiles // p.tiles_at_once
    problem = None

    def sizes():
        nonlocal problem
        problem, *rest = prepare(shape, num_tokens)
        return rest

    jax.eval_shape(sizes)
    return launch.launch(problem, scalars, arrays)


def prepare(shape: Shape, num_tokens: int):
    """Prepares a launch over a full cache: coded, and pools and window of `ott`; or dense."""
    dtype = jnp.bfloat16
    spec = kvq.CacheSpec(shape.batch_size, shape.num_kv_heads, num_tokens, shape.head_dim, dtype)
    q_heads = shape.num_queries * shape.num_kv_heads
    q = jnp.zeros((shape.batch_size, shape.num_tokens, q_heads, shape.head_dim), dtype)
    key_codec, value_codec = shape.codecs
    if shape.bits:
        # The simulation knows only copies of whole registers: pools and window of 256 slots.
        tracer = kvq.OutlierTracer()
        window = 256 - tracer.num_slots
        method = kvq.Window(
            key_codec,
            value_codec,
            shape.group_size,
            residual_length=window - shape.group_size,
            tracer=tracer,
            layout="tpu",
        )
        spec = dataclasses.replace(spec, capacity=num_tokens + window)
    else:
        method = kvq.dense()
    state = method.init(spec)
    dense, coded, *_ = method.segments(state)
    assert isinstance(dense, RingKV) and (coded is None or isinstance(coded, CodedSegment))
    return launch.prepare(
        q,
        state.length,
        dense,
        coded,
        key_codec,
        value_codec,
        sm_scale=1.0,
        sliding_window=None,
    )


MEMORY = [
    # model, chip, devices, tokens, method
    ("llama-3-8b", "v5e", 1, 32768, "ott"),
    ("llama-3-8b", "v5e", 1, 32768, "dense"),
    ("llama-3.2-1b", "v5e", 1, 131072, "ott"),
    ("llama-3.2-1b", "v5e", 1, 131072, "dense"),
    ("llama-3.1-8b", "v5e", 4, 131072, "ott"),
    ("llama-3.1-8b", "v5e", 4, 131072, "dense"),
    ("llama-3.1-8b", "v6e", 1, 131072, "ott"),
    ("llama-3.1-8b", "v6e", 1, 131072, "dense"),
    ("llama-3.1-8b", "v5p", 1, 131072, "ott"),
    ("llama-3.1-8b", "7x", 1, 131072, "ott"),
]


def memory():
    """Yields what decode steps take of a device's memory."""
    for model, chip, devices, context, name in MEMORY:
        start = time.perf_counter()
        row = {"model": model, "chip": chip, "devices": devices, "context": context}
        row |= {"method": name} | step(SHAPES[model], chip, devices, context, name)
        row["seconds"] = time.perf_counter() - start
        print(
            f"{model} in bf16, {context} tokens, {name}, {devices} x {chip}:"
            f" {row['required_gib']:.2f} of {row['hbm_gib']:.2f} GiB,"
            f" {'fits' if row['fits'] else 'does not fit'}; cache {row['cache_gib']:.2f} GiB"
            + (f", temporaries {row['temp_of_cache']:.2%} of it" if row["fits"] else ""),
            flush=True,
        )
        yield row


def step(config, chip: str, devices: int, context: int, name: str) -> dict:
    """Compiles a decode step."""
    step = fits.Step(config, getattr(kvq, name)(), context, num_devices=devices)
    cache = nbytes(step.states) / devices
    row = {"cache_gib": cache / 2**30, "hbm_gib": aot.CHIPS[chip].hbm_bytes / 2**30}
    try:
        compiled = step.compile_for(chip)
    except aot.DoesNotFit as error:
        return row | {"fits": False, "required_gib": error.required_bytes / 2**30}
    return row | {
        "fits": True,
        "required_gib": compiled.peak_bytes / 2**30,
        "temp_of_cache": compiled.temp_bytes / cache,
    }


if __name__ == "__main__":
    # The compiling process imports these functions by the module's name, not as __main__.
    sys.path.insert(0, str(Path(__file__).parent))
    import tpu_static

    tpu_static.main()
