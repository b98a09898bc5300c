# SPDX-License-Identifier: Apache-2.0
"""Codecs: small stand-ins for tensors."""

from kvq_jax.codecs.affine import Affine, AffineCode
from kvq_jax.codecs.base import Codec

__all__ = ["Affine", "AffineCode", "Codec"]
