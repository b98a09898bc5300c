# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, for models and for caches that keep keys from before it."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def turn(
    x: Float[Array, "*d H"], cos: Float[Array, "*#d half"], sin: Float[Array, "*#d half"]
) -> Float[Array, "*d H"]:
    """Turns the channel pairs (i, i + H/2) by an angle each, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
