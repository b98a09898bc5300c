# SPDX-License-Identifier: Apache-2.0
"""Weighted k-means, for codebooks that are fitted to texts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LEAST = 1e-3
"""Of the mean weight; points of less count for this, so that all count for something."""


def kmeans(
    points: Float[Array, "n c"],
    weights: Float[Array, " n"] | None,
    num_centroids: int,
    iterations: int,
) -> Float[Array, "k c"]:
    """Returns centroids of small weighted square distance to the points.

    They start at points drawn by k-means++, always with the same seed, and each iteration moves
    them to the weighted means of the points nearest to them; one that is nearest to none stays.
    """
    if weights is None:
        weights = jnp.ones(len(points))
    weights = jnp.maximum(weights, _LEAST * weights.mean())

    def draw(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, distance = carry
        mass = jnp.cumsum(weights * distance)  # one random number a draw, not one for each point
        at = mass[-1] * jax.random.uniform(jax.random.fold_in(jax.random.key(0), i))
        new = jnp.take(points, jnp.searchsorted(mass, at, side="right"), axis=0, mode="clip")
        distance = jnp.minimum(distance, jnp.square(points - new).sum(-1))
        return centroids.at[i].set(new), distance

    def move(_, centroids: Array) -> Array:
        cross = jnp.einsum("nc,kc->nk", points, centroids, precision="highest")
        distance = jnp.square(centroids).sum(-1) - 2 * cross
        # Sums as products of matrices: of the ten times slower argmin and scatter only ties differ.
        nearest = distance == distance.min(-1, keepdims=True)
        share = jnp.where(nearest, weights[:, None], 0)
        mass, total = share.sum(0), jnp.einsum("nk,nc->kc", share, points, precision="highest")
        return jnp.where(mass[:, None] > 0, total / jnp.maximum(mass, 1e-30)[:, None], centroids)

    start = jnp.zeros((num_centroids, points.shape[1])), jnp.ones(len(points))
    centroids, _ = jax.lax.fori_loop(0, num_centroids, draw, start)
    return jax.lax.fori_loop(0, iterations, move, centroids)
