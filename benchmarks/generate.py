# SPDX-License-Identifier: Apache-2.0
"""Tokens a second of `generate` with a model's own weights: other methods beside the dense cache.

    python benchmarks/generate.py --json benchmarks/results/generate.json
    python benchmarks/generate.py --batch 1 16 --prompt 17 7800 --steps-per-call 1 16
    kvq calibrate --out FITTED   # for `recommended`
    python benchmarks/generate.py --fitted FITTED

Prompts are random tokens, which changes no speed. Every figure is of the second run, when all is
compiled; of all rows together.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kvq_jax as kvq
from kvq_jax.cli.options import load_fitted, make_methods


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--fitted", type=Path, help="folder of kvq calibrate, to measure `recommended` too"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[7800], help="tokens of a row")
    parser.add_argument("--steps-per-call", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=241)
    options = parser.parse_args()
    model = kvq.models.load(options.model, dtype=jnp.dtype(options.dtype))
    names = ["dense", "ott", "recommended"] if options.fitted else ["dense", "ott"]
    methods, params = load_fitted(options.fitted, make_methods(names), model.config)
    rows = []
    for batch, length, steps in itertools.product(
        options.batch, options.prompt, options.steps_per_call
    ):
        prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(batch, length))
        row = {"batch": batch, "prompt": length, "steps_per_call": steps}
        for name, method in methods.items():
            runs = [
                kvq.generate(
                    model,
                    prompts.tolist(),
                    method=method,
                    params=params.get(name),
                    max_new_tokens=options.new_tokens,
                    stop_tokens=(),
                    steps_per_call=steps,
                )
                for _ in range(2)
            ]
            row[name] = runs[1].tokens_per_second
        rows.append(row)
        figures = (f"{name} {row[name]:.0f} ({row[name] / row['dense']:.2f}x)" for name in methods)
        print(
            f"batch {batch}, prompt {length}, {steps} steps a call: {', '.join(figures)} tokens/s",
            flush=True,
        )
    if options.json:
        device = jax.devices()[0].device_kind
        report = {"jax": jax.__version__, "device": device, "dtype": options.dtype, "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
