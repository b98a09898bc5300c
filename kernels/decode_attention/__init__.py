# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens over a coded and a dense segment."""

from kvq_jax.kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
