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
            self.batch_size,
            self.num_kv_heads,
            capacity,
            self.head_dim,
            self.dtype,
            rope=tuple(10000 ** -(i / self.head_dim) for i in range(0, self.head_dim, 2)),
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
        the method's docstring has it. A method that finds sizes gives these for bits.
      shapes: to run it on; one does for those that differ from others in policy or codec alone.
      codec_only: whether it differs from another case in the codecs alone, or in the score of
        outliers: then `calls_test.py` would say nothing new.
      worst: largest error of one number of `contract.tokens` in 8 bits.
    """

    make: Callable[[int, int], kvq.CacheTransform]
    nbytes: Callable[[kvq.CacheSpec, int, int, int, int], float]
    shapes: tuple[str, ...] = ("gqa",)
    codec_only: bool = False
    worst: float = 12 / 255  # affine codes of a range of up to 12

    @property
    def is_policy(self) -> bool:
        """Whether it has rules of its own for which tokens are coded, and when.

        What is fitted to prompts or texts does not change them.
        """
        method = self.make(2, 2)
        return not (self.codec_only or method.needs_prompt or method.needs_texts)


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


def token_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `nqkv` and `turboquant`: a scale of each token."""
    width, d = spec.head_dim, spec.dtype.itemsize
    head = coded * width * (bits + value_bits) / 8 + 4 * coded
    head += 2 * (GROUP + RESIDUAL) * width * d
    return spec.batch_size * (spec.num_kv_heads * head + 4 + 4 + 4 * blocks)


def decoquant_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `decoquant`."""
    return token_nbytes(spec, bits, value_bits, coded, blocks) + spec.batch_size * 16 * 16**2


def squat_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `squat`."""
    feedback = 4 * spec.batch_size * spec.num_kv_heads * spec.head_dim**2
    return kivi_nbytes(spec, bits, value_bits, coded, blocks) + feedback


# Of four bands, since each is compiled by itself; tests/codecs/latent_test.py has eight.
SCHEDULES = {2: (4, 2, 2, 0), 4: (8, 4, 4, 0), 8: (8, 8, 8, 8)}


def svdq_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `svdq` with one sink."""
    width = spec.num_kv_heads * spec.head_dim
    kept = sum(b > 0 for b in SCHEDULES[bits]) / 4
    saved = 4 * coded * width * (1 - kept) / GROUP
    fitted = 4 * width * (1 + width) + 2 * spec.head_dim
    sink = 2 * width * spec.dtype.itemsize + spec.num_kv_heads * (8 + 5)
    row = fitted + sink - saved
    return kivi_nbytes(spec, bits, value_bits, coded, blocks) + spec.batch_size * row


CODEBOOKS = {2: (4, 8), 4: (2, 8), 8: (1, 8)}


def cq_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `cq` with one sink; keys and values have the same bits."""
    channels, code_bits = CODEBOOKS[bits]
    head = 2 * coded * (spec.head_dim / channels * code_bits + 2) / 8
    head += 2 * (GROUP + RESIDUAL + 1) * spec.head_dim * spec.dtype.itemsize + 8 + 5
    row = spec.num_kv_heads * head + 2 * spec.head_dim + 4 + 4 + 4 * blocks
    return spec.batch_size * row + 4 * spec.num_kv_heads * spec.head_dim * 2**code_bits


def kvquant_nbytes(spec, bits, value_bits, coded, blocks):
    """Returns the formula of `kvquant` with one outlier of a head's token and one sink."""
    width, d = spec.head_dim, spec.dtype.itemsize
    head = coded * width * (bits + value_bits) / 8 + 6 * coded + 4 * coded
    head += 2 * (GROUP + RESIDUAL + 1) * width * d + 8 + 5
    row = spec.num_kv_heads * head + 2 * width + 4 + 4 + 4 * blocks
    shared = 8 * spec.num_kv_heads * width + 4 * (2**bits + 2**value_bits)
    return spec.batch_size * row + shared


def transform_coding_nbytes(spec, keys, values, coded, blocks):
    """Returns the formula of `transform_coding`, of how many channels have each bit."""
    heads, width, d = spec.num_kv_heads, spec.head_dim, spec.dtype.itemsize
    planes = (-(-(2 + sum(counts)) // heads) * heads for counts in (keys, values))
    row = coded * sum(planes) / 8
    row += heads * (2 * (GROUP + RESIDUAL + 1) * width * d + 8 + 5)
    row += 2 * width + 4 + 4 + 4 * blocks
    shared = sum(
        4 * heads * width * counts[0] + 8 * heads * width + 4 * counts[0] + 4 * sum(counts)
        for counts in (keys, values)
    )
    return spec.batch_size * row + shared


def factor_nbytes(of_values):
    """Returns the formulas of `tokennorm` and `kvarn`: KIVI's, and factors."""

    def formula(spec, bits, value_bits, coded, blocks):
        factors = 2 * coded * (1 + of_values * spec.head_dim / GROUP)
        factors *= spec.batch_size * spec.num_kv_heads
        return kivi_nbytes(spec, bits, value_bits, coded, blocks) + factors

    return formula


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
    "dense": Case(lambda bits, value_bits: kvq.dense(), dense_nbytes, tuple(SHAPES)),
    "kivi": Case(coded_with(kvq.kivi), kivi_nbytes, tuple(SHAPES)),
    "ott": Case(coded_with(kvq.ott), pool_nbytes(3, 32), tuple(SHAPES)),
    "ott-l2-shared": Case(
        coded_with(kvq.ott, score="l2", share_heads=True, num_outliers=2),
        pool_nbytes(2, 32),
        codec_only=True,
    ),
    # The auxiliary pool overflows within the test's tokens, so tracing stops.
    "ott-tight": Case(coded_with(kvq.ott, num_outliers=4, num_auxiliary=3), pool_nbytes(4, 3)),
    "sink": Case(coded_with(kvq.sink), pool_nbytes(4, 0), codec_only=True),
    # Levels are sparse where numbers are rare.
    "nqkv": Case(coded_with(kvq.nqkv), token_nbytes, codec_only=True, worst=0.1),
    "turboquant": Case(coded_with(kvq.turboquant), token_nbytes, codec_only=True, worst=0.6),
    "tokennorm": Case(coded_with(kvq.tokennorm), factor_nbytes(False), codec_only=True),
    "kvarn": Case(coded_with(kvq.kvarn), factor_nbytes(True), codec_only=True),
    "decoquant": Case(coded_with(kvq.decoquant), decoquant_nbytes),
    "squat": Case(coded_with(kvq.squat), squat_nbytes, codec_only=True),
    # Of one pair of widths it is KIVI; of several: tests/engines/layered_test.py
    "adaquant": Case(coded_with(kvq.adaquant), kivi_nbytes, (), codec_only=True),
    "svdq": Case(
        lambda bits, value_bits: kvq.svdq(
            schedule=SCHEDULES[bits],
            value_bits=value_bits,
            group_size=GROUP,
            residual_length=RESIDUAL,
        ),
        svdq_nbytes,
        codec_only=True,
    ),
    "cq": Case(
        lambda bits, value_bits: kvq.cq(
            channels=CODEBOOKS[bits][0],
            bits=CODEBOOKS[bits][1],
            iterations=5,
            group_size=GROUP,
            residual_length=RESIDUAL,
        ),
        cq_nbytes,
        codec_only=True,
        worst=1.5,
    ),
    "transform_coding": Case(
        # One budget for keys and values.
        lambda bits, value_bits: kvq.transform_coding(
            bits=(bits + value_bits) / 2, group_size=GROUP, residual_length=RESIDUAL
        ),
        transform_coding_nbytes,
        codec_only=True,  # beside KVQuant
        worst=0.5,
    ),
    "kvquant": Case(coded_with(kvq.kvquant), kvquant_nbytes, worst=1.5),
}
