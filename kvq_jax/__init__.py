# SPDX-License-Identifier: Apache-2.0
"""KV-cache quantization for JAX."""

from kvq_jax.base import (
    KV,
    CacheSpec,
    CacheTransform,
    CodedSegment,
    nbytes,
    nbytes_by_part,
)
from kvq_jax.engines import OutlierTracer, Window
from kvq_jax.kernels.decode_attention import decode_attention
from kvq_jax.methods import dense, kivi, ott, sink
from kvq_jax.rows import insert_row, select_rows

__all__ = [
    "KV",
    "CacheSpec",
    "CacheTransform",
    "CodedSegment",
    "OutlierTracer",
    "Window",
    "decode_attention",
    "dense",
    "insert_row",
    "kivi",
    "nbytes",
    "nbytes_by_part",
    "ott",
    "select_rows",
    "sink",
]
