# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from kvq_jax.models import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=2,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be a positive integer"),
        ("norm_eps", 0.0, "norm_eps must be a positive number"),
        ("rope_theta", float("nan"), "rope_theta must be a positive number"),
        ("num_kv_heads", 4, "num_q_heads=6 is not a multiple of num_kv_heads=4"),
        ("head_dim", 7, "even head_dim"),
        ("rope_divisors", (1.0,), "head_dim // 2 = 4 numbers, got 1"),
        ("sliding_window", 0, "sliding_window must be positive or None"),
    ],
)
def test_impossible_sizes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})
