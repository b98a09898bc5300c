# SPDX-License-Identifier: Apache-2.0
"""Codecs: small stand-ins for tensors."""

from kvq_jax.codecs.affine import Affine, AffineCode
from kvq_jax.codecs.base import Codec
from kvq_jax.codecs.levels import dynamic_exponent, lloyd_max, normal_float, symmetric
from kvq_jax.codecs.normalized import Normalized, NormalizedCode
from kvq_jax.codecs.table import Table, TableCode
from kvq_jax.codecs.tiled import Tiled

__all__ = [
    "Affine",
    "AffineCode",
    "Codec",
    "Normalized",
    "NormalizedCode",
    "Table",
    "TableCode",
    "Tiled",
    "dynamic_exponent",
    "lloyd_max",
    "normal_float",
    "symmetric",
]
