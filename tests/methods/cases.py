# SPDX-License-Identifier: Apache-2.0
"""The rows of the contract matrix: methods, and shapes to run them on."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

import kvq_jax as kvq


class Shape(NamedTuple):
    """Sizes of one run."""

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: type

    def spec(self, capacity: int) -> kvq.CacheSpec:
        """Returns the cache's spec."""
        return kvq.CacheSpec(
            self.batch_size, self.num_kv_heads, capacity, self.head_dim, self.dtype
        )


SHAPES = {
    "gqa": Shape(2, 4, 2, 64, jnp.float32),
    "mqa": Shape(2, 3, 1, 256, jnp.float32),
    "mha": Shape(1, 2, 2, 32, jnp.float32),
    "bf16": Shape(2, 4, 2, 128, jnp.bfloat16),
}


class Case(NamedTuple):
    """A method and what is claimed of it.

    Attributes:
      make: the method from the bits of keys and of values; those without bits ignore them.
      nbytes: bytes of a state from the spec, bits, and the coded slots and blocks of a row, as
        the method's docstring has it.
    """

    make: Callable[[int, int], kvq.CacheTransform]
    nbytes: Callable[[kvq.CacheSpec, int, int, int, int], float]


GROUP, RESIDUAL = 32, 16


def dense_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `dense`."""
    row = 2 * spec.num_kv_heads * spec.capacity * spec.head_dim * spec.dtype.itemsize
    return spec.batch_size * (row + 4)


def kivi_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `kivi`."""
    width, d = spec.head_dim, spec.dtype.itemsize
    head = coded * width * (bits + value_bits) / 8
    head += 4 * coded * width * (1 / GROUP + 1 / min(GROUP, width))
    head += 2 * (GROUP + RESIDUAL) * width * d
    return spec.batch_size * (spec.num_kv_heads * head + 4 + 4 + 4 * blocks)


def pool_nbytes(num_outliers, num_auxiliary):
    """Returns the formula of `kivi` with pools, as `ott` and `sink` have it."""

    def formula(spec, bits, value_bits, coded, blocks):
        slots = num_outliers + num_auxiliary
        head = 2 * slots * spec.head_dim * spec.dtype.itemsize
        head += 4 * num_outliers + 4 * slots + 5
        pools = spec.batch_size * spec.num_kv_heads * head
        return kivi_nbytes(spec, bits, value_bits, coded, blocks) + pools

    return formula


def coded_with(constructor, **options):
    """Returns a `Case.make` of a method with codes."""
    return lambda bits, value_bits: constructor(
        bits=bits, value_bits=value_bits, group_size=GROUP, residual_length=RESIDUAL, **options
    )


CASES = {
    "dense": Case(lambda bits, value_bits: kvq.dense(), dense_nbytes),
    "kivi": Case(coded_with(kvq.kivi), kivi_nbytes),
    "ott": Case(coded_with(kvq.ott), pool_nbytes(3, 32)),
    "ott-l2-shared": Case(
        coded_with(kvq.ott, score="l2", share_heads=True, num_outliers=2), pool_nbytes(2, 32)
    ),
    # The auxiliary pool overflows within the test's tokens, so tracing stops.
    "ott-tight": Case(coded_with(kvq.ott, num_outliers=4, num_auxiliary=3), pool_nbytes(4, 3)),
    "sink": Case(coded_with(kvq.sink), pool_nbytes(4, 0)),
}
