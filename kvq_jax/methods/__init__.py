# SPDX-License-Identifier: Apache-2.0
"""Methods: one paper, one file."""

from kvq_jax.methods.dense import Dense, DenseState, dense
from kvq_jax.methods.kivi import kivi
from kvq_jax.methods.ott import ott
from kvq_jax.methods.sink import sink

__all__ = ["Dense", "DenseState", "dense", "kivi", "ott", "sink"]
