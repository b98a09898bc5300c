# SPDX-License-Identifier: Apache-2.0
"""KV-cache quantization for JAX.

The core needs jax and numpy. `models`, `generate`, `stream`, `calibrate` and `Sampling` bring Flax
in and are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
from kvq_jax.methods import (
    adaquant,
    cq,
    decoquant,
    dense,
    kivi,
    kvarn,
    kvquant,
    nqkv,
    ott,
    recommended,
    sink,
    squat,
    svdq,
    tokennorm,
    transform_coding,
    turboquant,
)
from kvq_jax.rows import insert_row, select_rows
from kvq_jax.sharding import Sharded

if TYPE_CHECKING:
    from kvq_jax import models
    from kvq_jax.decoding.generation import Generation, generate, stream
    from kvq_jax.decoding.sampling import Sampling
    from kvq_jax.fitting.fit import calibrate, calibrate_all
    from kvq_jax.fitting.store import Calibration, load_calibration, save_calibration

__all__ = [
    "KV",
    "CacheSpec",
    "CacheTransform",
    "Calibration",
    "CodedSegment",
    "Generation",
    "OutlierTracer",
    "Sampling",
    "Sharded",
    "Window",
    "adaquant",
    "calibrate",
    "calibrate_all",
    "cq",
    "decode_attention",
    "decoquant",
    "dense",
    "generate",
    "insert_row",
    "kivi",
    "kvarn",
    "kvquant",
    "load_calibration",
    "models",
    "nbytes",
    "nbytes_by_part",
    "nqkv",
    "ott",
    "recommended",
    "save_calibration",
    "select_rows",
    "sink",
    "squat",
    "stream",
    "svdq",
    "tokennorm",
    "transform_coding",
    "turboquant",
]

_LAZY = {
    "models": "kvq_jax.models",
    "calibrate": "kvq_jax.fitting.fit",
    "calibrate_all": "kvq_jax.fitting.fit",
    "load_calibration": "kvq_jax.fitting.store",
    "save_calibration": "kvq_jax.fitting.store",
    "Calibration": "kvq_jax.fitting.store",
    "generate": "kvq_jax.decoding.generation",
    "stream": "kvq_jax.decoding.generation",
    "Generation": "kvq_jax.decoding.generation",
    "Sampling": "kvq_jax.decoding.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "models" else getattr(module, name)
