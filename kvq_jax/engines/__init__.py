# SPDX-License-Identifier: Apache-2.0
"""Engines: caches made of codecs and a policy for tokens."""

from kvq_jax.engines.layered import Layered, LayeredState
from kvq_jax.engines.outliers import OutlierTracer, PoolState
from kvq_jax.engines.segments import SegmentedCache, Segments
from kvq_jax.engines.window import Window, WindowState

__all__ = [
    "Layered",
    "LayeredState",
    "OutlierTracer",
    "PoolState",
    "SegmentedCache",
    "Segments",
    "Window",
    "WindowState",
]
