# SPDX-License-Identifier: Apache-2.0
"""Sums whose last bits don't depend on how many are computed together.

XLA chooses the order of its own sums by the shape, and where it fuses a product with a sum, the
product isn't rounded. So a group's numbers would differ by whether it is coded alone or with
others, and a cache by how its tokens were cut into calls.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def ordered_sum(x: Array, axis: int) -> Array:
    """Sums over an axis, which stays, always in the same order."""
    while (size := x.shape[axis]) > 1:
        half = size // 2
        first, second, rest = jnp.split(x, [half, 2 * half], axis)
        x = jnp.concatenate([first + second, rest], axis) if size % 2 else first + second
    return x


def exact_square(x: Array) -> Array:
    """Squares float32 numbers of so many bits that the product needs no rounding."""
    return jnp.square(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11))
