# SPDX-License-Identifier: Apache-2.0
"""Frames: linear coordinates in which a cache keeps its keys or values, whole.

What is stored never leaves them: queries are taken to where their products with the stored keys
are what they were, and the output of attention, a mean of stored values, is taken back. So codes
are read as they are, whatever the frame, and attention costs no more.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvq_jax.base import CacheSpec, Params
from kvq_jax.codecs.base import Part, Sample

_LEAST = 1e-6
"""Of the largest variance; directions of less are taken for this."""


@dataclasses.dataclass(frozen=True)
class Frame(Part):
    """Keeps vectors as they come: the frame that changes nothing."""

    def enter(self, x: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Returns keys or values as they are stored."""
        return x

    def leave(self, z: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Undoes `enter`."""
        return z

    def absorb(self, q: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Returns the q' for which q' · z = q · leave(z)."""
        return q


AS_GIVEN = Frame()


@dataclasses.dataclass(frozen=True)
class Hadamard(Frame):
    """Rotates each head: every channel is spread evenly over all.

    The Walsh-Hadamard transform over sqrt(n), of blocks of n channels, the largest power of two
    that divides head_dim. By sums and differences alone, whose last bits don't depend on how
    many tokens there are.

    Args:
      seed: of random signs that the channels get before; None for no signs.
    """

    seed: int | None = None

    def enter(self, x: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Rotates."""
        return _hadamard(x.astype(jnp.float32) * self._signs(x.shape[-1])).astype(x.dtype)

    def leave(self, z: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Rotates back."""
        return (_hadamard(z.astype(jnp.float32)) * self._signs(z.shape[-1])).astype(z.dtype)

    def absorb(self, q: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Rotates: products of rotated vectors are what they were."""
        return self.enter(q)

    def _signs(self, head_dim: int) -> Array:
        if self.seed is None:
            return jnp.ones(head_dim)
        signs = np.random.default_rng(self.seed).choice([-1.0, 1.0], head_dim)
        return jnp.asarray(signs, jnp.float32)


@dataclasses.dataclass(frozen=True)
class BlockLinear(Frame):
    """Evens out the variances of a row's prompt, the same way in all blocks of channels and heads.

    With the mean square M = V S² Vᵀ of all blocks x of the prompt, z = x V S^(-1/2): the root
    of each principal direction's spread is divided out, and stays in the frame. Until a
    prompt comes, and where none does, z = x.

    Args:
      block: channels; cut to head_dim where that is smaller, and else a divisor of it.
      params: (into, back), set by `bind`.
    """

    block: int
    params: Any = ()
    fits = "prompt"

    @property
    def shares_heads(self) -> bool:
        """Is true; see `Part`."""
        return True

    def init(self, spec: CacheSpec) -> Params:
        """Returns the matrices that change nothing."""
        eye = np.eye(self._width(spec.head_dim), dtype=np.float32)[None]
        # Two arrays: one could not be donated twice.
        into, back = (jnp.asarray(eye.repeat(spec.batch_size, 0)) for _ in range(2))
        return into, back

    def fit(self, sample: Sample) -> Params:
        """Returns the matrices `B block block` into the frame and back."""
        width = self._width(sample.x.shape[-1])
        x = jnp.where(sample.mask[..., None, None], sample.x.astype(jnp.float32), 0)
        blocks = x.reshape(len(x), -1, width)
        square = jnp.einsum("bni,bnj->bij", blocks, blocks, precision="highest")
        count = sample.mask.sum(1, dtype=jnp.float32) * (blocks.shape[1] // x.shape[1])
        variance, axes = jnp.linalg.eigh(square / jnp.maximum(count, 1)[:, None, None])
        variance = jnp.maximum(variance, _LEAST * variance.max(-1, keepdims=True))
        # Of a prompt of nothing but zeros any frame will do.
        root = jnp.where(variance == 0, 1, variance) ** 0.25
        return axes / root[:, None], (axes * root[:, None]).swapaxes(1, 2)

    def bind(self, params: Params) -> "BlockLinear":
        """Returns the frame of these matrices."""
        return dataclasses.replace(self, params=params)

    def enter(self, x: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Evens out."""
        return self._apply(x, self.params[0])

    def leave(self, z: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Undoes it."""
        return self._apply(z, self.params[1])

    def absorb(self, q: Float[Array, "B *d H"]) -> Float[Array, "B *d H"]:
        """Multiplies by the transpose of what leads back."""
        return self._apply(q, self.params[1].swapaxes(1, 2))

    def _width(self, head_dim: int) -> int:
        width = min(self.block, head_dim)
        if head_dim % width:
            raise ValueError(f"blocks of {width} channels do not divide head_dim={head_dim}")
        return width

    def _apply(self, x: Array, matrix: Array) -> Array:
        blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, matrix.shape[-1])
        blocks = jnp.einsum("b...i,bij->b...j", blocks, matrix, precision="highest")
        return blocks.reshape(x.shape).astype(x.dtype)


def _hadamard(x: Array) -> Array:
    size = x.shape[-1] & -x.shape[-1]
    lead, half = x.shape, 1
    while half < size:
        x = x.reshape(*lead[:-1], -1, 2, half)
        first, second = x[..., 0, :], x[..., 1, :]
        x = jnp.stack([first + second, first - second], -2)
        half *= 2
    return x.reshape(lead) * size**-0.5
