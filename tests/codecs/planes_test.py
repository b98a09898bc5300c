# SPDX-License-Identifier: Apache-2.0
"""Bit planes: the definition in numpy, holes, what the fit minimises, and the shares of bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.planes import Planes, find_latents, make_params
from kvq_jax.fitting.allocation import allocate

B, K, N, S, H = 2, 3, 4, 32, 8
D = K * H
SPEC = kvq.CacheSpec(B, K, 256, H)


def sample(key, num_tokens=2048):
    """Vectors whose channels depend on each other across heads, and gradients that do."""
    kx, kg, ka, kb = jax.random.split(key, 4)
    spread = jnp.exp(-jnp.arange(D) / 6)
    mix, slopes = (jnp.linalg.qr(jax.random.normal(k, (D, D)))[0] for k in (ka, kb))
    x = jax.random.normal(kx, (num_tokens, D)) * spread @ mix + 3
    gradient = jax.random.normal(kg, (num_tokens, D)) * spread @ slopes
    x, gradient = (a.reshape(1, num_tokens, K, H) for a in (x, gradient))
    return Sample(x, jnp.ones((1, num_tokens), bool), gradient=gradient)


def fitted(key, bits=2.0):
    latents = find_latents(sample(key))
    share = np.array(allocate(latents.error, range(9), bits, "greedy"))
    params, sizes = make_params(latents, share)
    return Planes(sizes=(sizes,)).bind(jax.tree.map(jnp.asarray, params)), share


def groups(x):
    return x.reshape(B, N, S, K, H).transpose(0, 3, 1, 2, 4)


def by_definition(codec, x):
    """Levels and decoded vectors `B N S ...` as the docstring has them, in numpy."""
    p = jax.tree.map(lambda a: np.asarray(a[0], np.float64), codec.params)
    x = np.asarray(x, np.float64).transpose(0, 2, 3, 1, 4).reshape(B, N, S, D)
    step, bits = p.steps[0], sum(np.arange(p.offset.size) < x.size for x in p.steps)
    level = np.rint(((x - p.mean) @ p.analysis - p.offset) / step).clip(0, 2**bits - 1)
    return level.astype(int), p.constant + (level * step) @ p.synthesis


def test_codes_and_decodes_as_defined(getkey):
    codec, share = fitted(getkey())
    x = groups(sample(getkey(), B * N * S).x)
    level, expected = by_definition(codec, x)
    words = np.asarray(jax.jit(codec.encode)(x).words)  # B K N 1 P/K, a word for 32 tokens
    assert words.shape == (B, K, N, 1, -(-(2 + share.sum()) // K))
    token_bits = words[..., 0, :, None] >> np.arange(32, dtype=np.uint32) & 1
    planes = token_bits.transpose(0, 2, 4, 1, 3).reshape(B, N, S, -1)
    assert (planes[..., 0] == 1).all() and (planes[..., 1] == 0).all()
    widths = np.sort(share[share > 0])[::-1]
    at, stored = 2, np.zeros_like(level)
    for bit in range(widths.max()):
        n = (widths > bit).sum()
        stored[..., :n] += planes[..., at : at + n].astype(int) << bit
        at += n
    # The levels, but where float32 rounds the other way.
    assert (stored == level).mean((0, 1, 2)).min() > 0.999
    assert (planes[..., at:] == 0).all()
    decoded = codec.decode(codec.encode(x), jnp.float32)
    decoded = np.asarray(decoded).transpose(0, 2, 3, 1, 4).reshape(B, N, S, D)
    same = np.isclose(decoded, expected, atol=1e-4).all(-1)
    assert same.mean() > 0.99
    assert np.square(decoded - expected).mean() < 0.01 * np.square(expected - 3).mean()


def test_a_group_alone_has_the_code_that_it_has_among_others(getkey):
    codec, _ = fitted(getkey())
    x = groups(sample(getkey(), B * N * S).x)
    encode = jax.jit(codec.encode)
    whole = encode(x).words
    for i in range(N):
        np.testing.assert_array_equal(encode(x[:, :, i : i + 1]).words, whole[:, :, i : i + 1])
    blocks = jax.tree.map(lambda a: a.reshape(B, K, 2, 2, *a.shape[3:]), encode(x))
    np.testing.assert_array_equal(
        codec.decode(blocks, jnp.float32).reshape(x.shape), codec.decode(encode(x), jnp.float32)
    )


def test_holes_and_what_is_not_finite(getkey):
    codec, _ = fitted(getkey())
    x = groups(sample(getkey(), B * N * S).x).at[1, 0, 2, 7, 3].set(jnp.nan)
    mask = jax.random.bernoulli(getkey(), 0.7, (B, 1, N, S)).at[1, 0, 2, 7].set(True)
    mask = jnp.broadcast_to(mask, (B, K, N, S))
    code, full = codec.encode(x, mask), codec.decode(codec.encode(x), jnp.float32)
    np.testing.assert_array_equal(codec.mask(code), mask)
    assert codec.mask(codec.encode(x)).all()
    expected = jnp.where(mask[..., None], full, 0)
    np.testing.assert_array_equal(codec.decode(code, jnp.float32), expected)
    assert jnp.isnan(full[1, :, 2, 7]).all() and jnp.isnan(full).sum() == D
    empty = jax.tree.map(jnp.zeros_like, code)
    assert not codec.mask(empty).any() and (codec.decode(empty, jnp.float32) == 0).all()


def test_errors_of_latents_are_errors_in_the_metric(getkey):
    x = sample(getkey())
    latents = find_latents(x)
    np.testing.assert_allclose(latents.analysis @ latents.synthesis, np.eye(D), atol=1e-8)
    gradient, vectors = (np.asarray(a, np.float64).reshape(-1, D) for a in (x.gradient, x.x))
    metric = gradient.T @ gradient / len(gradient)
    metric += 0.05 * np.trace(metric) / D * np.eye(D)
    np.testing.assert_allclose(latents.analysis @ latents.analysis.T, metric, atol=1e-8)
    z = (vectors - latents.mean) @ latents.analysis
    spread = z.T @ z / len(z)
    np.testing.assert_allclose(spread, np.diag(np.diag(spread)), atol=1e-8)
    np.testing.assert_allclose(latents.error[:, 0], np.diag(spread), rtol=1e-4)
    assert (np.diff(latents.error[:, 0]) < 1e-6).all(), "the leading channel comes first"
    for bits in (1, 3, 8):
        offset, step = latents.offset[:, bits], latents.step[:, bits]
        level = np.rint((z - offset) / step).clip(0, 2**bits - 1)
        error = np.square(z - offset - level * step).mean(0)
        np.testing.assert_allclose(latents.error[:, bits], error, rtol=1e-2)
        # As good as is known of uniform levels for a normal distribution.
        known = {1: 0.3634, 3: 0.03744, 8: 1.08e-4}[bits]
        assert error.mean() < 1.05 * known * np.square(z).mean()


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.exponential, jax.random.laplace])
def test_levels_are_as_good_as_the_best_of_many(draw, getkey):
    z = draw(getkey(), (2048,)) * 3 + 5
    sample = Sample(z[None, :, None, None], jnp.ones((1, 2048), bool))
    error = find_latents(sample).error[0]
    z = np.sort(z)[:, None, None]
    ends = np.linspace(z[0, 0, 0], z[-1, 0, 0], 60)
    low, high = (x[ends[:, None] < ends] for x in np.meshgrid(ends, ends, indexing="ij"))
    for bits in (1, 2, 4):
        step = (high - low) / (2**bits - 1)
        level = np.rint((z[:, 0] - low) / step).clip(0, 2**bits - 1)
        assert error[bits] < 1.06 * np.square(z[:, 0] - low - step * level).mean(0).min()


def test_gradients_tell_what_matters(getkey):
    """At equal bits the error that the loss sees is less than by distance alone, and v.v."""
    x = sample(getkey())
    data, gradient = groups(x.x[:, : B * N * S]), np.asarray(x.gradient).reshape(-1, D)
    felt, plain = [], []
    for this in (x, x._replace(gradient=None)):
        latents = find_latents(this)
        share = np.array(allocate(latents.error, range(9), 2, "greedy"))
        params, _ = make_params(latents, share)
        codec = Planes().bind(jax.tree.map(jnp.asarray, params))
        error = np.asarray(codec.decode(codec.encode(data), jnp.float32) - data)
        error = error.transpose(0, 2, 3, 1, 4).reshape(-1, D)
        felt.append(np.square(error @ gradient.T).mean())
        plain.append(np.square(error).mean())
    assert felt[0] < 0.8 * felt[1]
    assert plain[1] < 0.8 * plain[0]


def test_without_any_bits_the_mean_is_left(getkey):
    x = sample(getkey())
    params, sizes = make_params(find_latents(x), np.zeros(D, int))
    assert sizes == ()
    codec = Planes().bind(jax.tree.map(jnp.asarray, params))
    data = groups(x.x[:, : B * N * S])
    decoded = codec.decode(codec.encode(data), jnp.float32)
    mean = np.asarray(x.x).mean(1).reshape(1, K, 1, 1, H)
    np.testing.assert_allclose(decoded, np.broadcast_to(mean, data.shape), atol=1e-4)


def test_refuses_what_is_not_fitted(getkey):
    with pytest.raises(ValueError, match=r"calibration = kvq_jax.calibrate\(model, texts, method"):
        Planes().of_layer(0)
    codec = Planes(sizes=((3, 2, 1), (2,), (2,)))
    assert codec.of_layer(0).init(SPEC).analysis.shape == (1, D, 3)
    assert [x.shape for x in codec.of_layer(None).init(SPEC).steps] == [(1, 2)]
    with pytest.raises(ValueError, match="layer 3 was not fitted: there were 3"):
        codec.of_layer(3)
    with pytest.raises(ValueError, match="the loss has no gradient"):
        x = sample(getkey())
        find_latents(x._replace(gradient=jnp.zeros_like(x.gradient)))
