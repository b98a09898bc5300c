# SPDX-License-Identifier: Apache-2.0
"""Codes, scales and weights as operands of the matrix unit."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kvq_jax.kernels.decode_attention.mosaic_tpu.problem import Part
from kvq_jax.kernels.decode_attention.tpu import operand_bits


def operand(words, part: Part):
    """Returns the 128 x 128 operand that the fields of words int32 `[R, 128]` are.

    Of 2 bits 1 + field / 4 in float8_e5m2, or field in bfloat16; of 4 bits 1 + field / 16, and of
    8 bits field - 128, in bfloat16.
    """
    if part.bits == 8:
        return pltpu.bitcast(words ^ _repeat(0x80, 8), jnp.int8).astype(jnp.bfloat16)
    width = operand_bits(part.bits)
    place = 3 if part.bits == 4 else 0  # of the highest bits of the mantissa
    mask = _repeat((2**part.bits - 1) << place, width)
    result = []
    for field in range(width // part.bits):
        shift = field * part.bits - place
        moved = jax.lax.shift_right_logical(words, shift) if shift > 0 else words << -shift
        moved = (moved if shift else words) & mask
        if part.bits == 4:
            result.append(pltpu.bitcast(moved | _repeat(0x3F80, 16), jnp.bfloat16))
        elif part.spliced:
            result.append(pltpu.bitcast(moved | _repeat(0x3C, 8), jnp.float8_e5m2))
        else:
            result.append(pltpu.bitcast(moved, jnp.int8).astype(jnp.bfloat16))
    return stack(result, 0)


def float32(pairs):
    """Returns scale and minimum of words of two float16, which few TPUs know."""

    def size(bits):
        normal = pltpu.bitcast(bits + (112 << 23), jnp.float32)  # the exponent's bias is 112 more
        subnormal = bits.astype(jnp.float32) * 2.0**-37  # has no leading 1
        return jnp.where(bits < 1 << 23, subnormal, normal)

    bits = (pairs & 0x7FFF) << 13
    # Where the minimum is not finite, neither is the scale.
    scale = jnp.where(bits < 31 << 23, size(bits), jnp.nan)
    minimum = size(jax.lax.shift_right_logical(pairs, 3) & 0x7FFF << 13)
    sign = pairs & -(1 << 31)
    return scale, pltpu.bitcast(pltpu.bitcast(minimum, jnp.int32) | sign, jnp.float32)


def split(x):
    """Returns float32 as two stacks of bfloat16, whose sum is as good: products become exact."""
    high = pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & -(1 << 16), jnp.float32)
    return jnp.concatenate([high, x - high], 0).astype(jnp.bfloat16)


def product(left, right, *, transposed: bool = False):
    """Returns left · right in float32, of a left operand from `split`; or left · rightᵀ."""
    contract = (1,), (1 if transposed else 0,)
    x = jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=jnp.float32)
    return x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]


def by_row(pieces):
    """Returns of each piece the rows that are its share."""
    row = jax.lax.broadcasted_iota(jnp.int32, pieces[0].shape, 0)
    return _choose(row, pieces[0].shape[0], pieces)


def by_lane(pieces, period: int):
    """Returns of each piece the lanes that are its share of every `period` lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, pieces[0].shape, 1)
    return _choose(lane if period >= pieces[0].shape[1] else lane % period, period, pieces)


def _choose(index, count: int, pieces):
    result = pieces[-1]
    for i in reversed(range(len(pieces) - 1)):
        result = jnp.where(index < (i + 1) * count // len(pieces), pieces[i], result)
    return result


def stack(parts, axis: int):
    """Concatenates, if there is more than one."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _repeat(pattern: int, width: int) -> int:
    """Returns the int32 of a pattern of so many bits, repeated."""
    word = sum(pattern << i for i in range(0, 32, width))
    return word - (1 << 32) if word >> 31 else word
