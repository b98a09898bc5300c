# SPDX-License-Identifier: Apache-2.0
"""Methods: one paper, one file."""

from kvq_jax.methods.adaquant import adaquant
from kvq_jax.methods.cq import cq
from kvq_jax.methods.decoquant import decoquant
from kvq_jax.methods.dense import Dense, DenseState, dense
from kvq_jax.methods.kivi import kivi
from kvq_jax.methods.kvarn import kvarn
from kvq_jax.methods.kvquant import kvquant
from kvq_jax.methods.nqkv import nqkv
from kvq_jax.methods.ott import ott
from kvq_jax.methods.sink import sink
from kvq_jax.methods.squat import squat
from kvq_jax.methods.svdq import svdq
from kvq_jax.methods.tokennorm import tokennorm
from kvq_jax.methods.transform_coding import TransformCoding, recommended, transform_coding
from kvq_jax.methods.turboquant import turboquant

__all__ = [
    "Dense",
    "DenseState",
    "TransformCoding",
    "adaquant",
    "cq",
    "decoquant",
    "dense",
    "kivi",
    "kvarn",
    "kvquant",
    "nqkv",
    "ott",
    "recommended",
    "sink",
    "squat",
    "svdq",
    "tokennorm",
    "transform_coding",
    "turboquant",
]
