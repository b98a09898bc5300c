# SPDX-License-Identifier: Apache-2.0
"""Fused attention over coded caches, one folder an op, one file a back end."""

if __name__ != "kvq_jax.kernels":
    raise ImportError("import kvq_jax.kernels, not kernels: a second copy would be made")
