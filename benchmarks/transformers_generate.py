# SPDX-License-Identifier: Apache-2.0
"""Times Hugging Face transformers' `generate` for `cpu.py`, in an environment of its own.

Reads lines "prompt_length new_tokens" and answers each with the seconds of the decode steps.
"""

import sys
import time
from pathlib import Path

import torch
import transformers

torch.set_num_threads(2)
file = Path(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
).eval()
print(f"transformers {transformers.__version__} torch {torch.__version__}", flush=True)


def seconds(prompt: torch.Tensor, new_tokens: int) -> float:
    """Returns the time of `generate`."""
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == prompt.shape[1] + new_tokens
    return time.perf_counter() - start


for line in sys.stdin:
    prompt_length, new_tokens = map(int, line.split())
    prompt = torch.arange(1000, 1000 + prompt_length)[None]
    # Without the prompt's share: `kvq_jax.generate` reports decode steps alone.
    print(seconds(prompt, new_tokens + 1) - seconds(prompt, 1), flush=True)
