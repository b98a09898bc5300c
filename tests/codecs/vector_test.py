# SPDX-License-Identifier: Apache-2.0
"""Vector codes and their k-means: nearest centroids, holes, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.kmeans import kmeans
from kvq_jax.codecs.vector import Vector

B, K, N, S, H = 2, 2, 3, 32, 16
every = pytest.mark.parametrize(
    "codec", [Vector(4, 3), Vector(2, 5), Vector(8, 10), Vector(1, 2)], ids=lambda x: f"{x.bits}b"
)


def bound(codec, key):
    spec = kvq.CacheSpec(1, K, 64, H, rope=(1.0,) * (H // 2))
    shape = codec.init(spec).shape
    return codec.bind(jax.random.normal(key, shape).astype(jnp.float16))


@every
def test_takes_the_nearest_centroid(codec, getkey):
    codec = bound(codec, getkey())
    x = jax.random.normal(getkey(), (B, K, N, S, H))
    decoded = np.asarray(codec.decode(jax.jit(codec.encode)(x), jnp.float32))
    vectors = np.asarray(x).reshape(B, K, N, S, -1, 1, codec.channels)
    centroids = np.asarray(codec.params, np.float32)[0][None, :, None, None]
    least = np.square(vectors - centroids).sum(-1).min(-1)
    error = np.square(np.asarray(x) - decoded).reshape(B, K, N, S, -1, codec.channels).sum(-1)
    np.testing.assert_allclose(error, least, rtol=1e-2, atol=1e-3)
    assert error.sum() < 0.9 * np.square(np.asarray(x) - decoded[:, ::-1]).sum()  # teeth


def test_reads_blocks_of_groups(getkey):
    """As `plain.read_blocks` asks: another axis before the groups."""
    codec = bound(Vector(4, 8), getkey())
    code = codec.encode(jax.random.normal(getkey(), (B, K, 4, S, H)))
    blocks = jax.tree.map(lambda x: x.reshape(B, K, 2, 2, *x.shape[3:]), code)
    np.testing.assert_array_equal(
        codec.decode(blocks, jnp.float32).reshape(B, K, 4, S, H), codec.decode(code, jnp.float32)
    )


def test_holes_and_what_is_not_finite(getkey):
    codec = bound(Vector(4, 8), getkey())
    x = jax.random.normal(getkey(), (B, K, N, S, H)).at[1, 0, 2, 7, 3].set(jnp.nan)
    mask = jax.random.bernoulli(getkey(), 0.7, x.shape[:-1]).at[1, 0, 2, 7].set(True)
    code, full = codec.encode(x, mask), codec.decode(codec.encode(x), jnp.float32)
    np.testing.assert_array_equal(codec.mask(code), mask)
    expected = jnp.where(mask[..., None], full, 0)
    np.testing.assert_array_equal(codec.decode(code, jnp.float32), expected)
    assert jnp.isnan(full[1, 0, 2, 7]).all()
    assert jnp.isnan(full).sum() == H
    empty = jax.tree.map(jnp.zeros_like, code)
    assert not codec.mask(empty).any() and (codec.decode(empty, jnp.float32) == 0).all()


def test_kmeans_finds_clusters_and_minds_weights(getkey):
    centers = jnp.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = jnp.repeat(centers, 50, 0) + 0.1 * jax.random.normal(getkey(), (200, 2))
    found = kmeans(points, None, 4, 10)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(centers, 0), atol=0.1)
    # One centroid for two clusters lies where the weight is.
    points = points[:100]
    for weight, at in ((1.0, 5.0), (9.0, 9.0)):
        weights = jnp.where(jnp.arange(100) < 50, 1.0, weight)
        np.testing.assert_allclose(kmeans(points, weights, 1, 3)[0, 0], at, atol=0.1)
    # Of more centroids than points each point is one.
    np.testing.assert_array_equal(np.unique(kmeans(centers, None, 7, 3), axis=0).shape, (4, 2))


def test_fitted_centroids_are_better_together(getkey):
    """2 bits a number: coupled channels beat single ones where channels depend on each other."""
    base = jax.random.normal(getkey(), (1, 2048, K, H // 4))
    x = jnp.repeat(base, 4, -1) + 0.3 * jax.random.normal(getkey(), (1, 2048, K, H))
    sample = Sample(x, jnp.ones(x.shape[:2], bool))
    keys = x.swapaxes(1, 2).reshape(1, K, -1, S, H)
    errors = []
    for codec in (Vector(4, 8, weighs=False), Vector(2, 4), Vector(1, 2)):
        codec = codec.bind(codec.fit(sample))
        assert codec.params.shape == codec.init(kvq.CacheSpec(1, K, 64, H)).shape
        decoded = codec.decode(codec.encode(keys), jnp.float32)
        errors.append(float(jnp.square(decoded - keys).mean()))
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="3 channels do not divide head_dim=16"):
        Vector(3, 8).init(kvq.CacheSpec(1, K, 64, H))
    with pytest.raises(ValueError, match="bits must be one of"):
        Vector(4, 11)
    with pytest.raises(ValueError, match="channels must be at least 1"):
        Vector(0, 8)
