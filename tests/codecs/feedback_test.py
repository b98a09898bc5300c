# SPDX-License-Identifier: Apache-2.0
"""Feedback: codes as before, scores better though keys are worse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs import Affine
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.feedback import Feedback

B, T, K, G, H = 2, 64, 2, 3, 64
CODEC = Feedback(2, (32, 1), channel_block=32, rank=8, weight=4.0)


def sample(key):
    """Queries mostly in few directions, other ones for each head."""
    kx, kq, kd = jax.random.split(key, 3)
    directions = jax.random.normal(kd, (K, 6, H))
    q = jax.random.normal(kq, (B, T, K, G, 6))
    q = jnp.einsum("btkgr,krh->btkgh", q, directions)
    x = jax.random.normal(kx, (B, T, K, H))
    return Sample(x, jnp.ones((B, T), bool), q.reshape(B, T, K * G, H))


def groups(x):
    """`B T K H` as codecs take it."""
    return x.swapaxes(1, 2).reshape(B, K, -1, 32, H)


def errors(codec, x):
    """Of keys and of their products with the queries, root mean squares."""
    keys = groups(x.x)
    error = codec.decode(codec.encode(keys), jnp.float32) - keys
    error = error.reshape(B, K, T, H)
    q = x.q.reshape(B, T, K, G, H)
    scores = jnp.einsum("btkgh,bksh->bkgts", q, error)
    return tuple(float(jnp.sqrt(jnp.square(y).mean())) for y in (error, scores))


def test_scores_are_better_though_keys_are_worse(getkey):
    x = sample(getkey())
    key_error, score_error = errors(CODEC.bind(CODEC.fit(x)), x)
    plain_key_error, plain_score_error = errors(Affine(2, (32, 1)), x)
    assert score_error < 0.8 * plain_score_error
    assert key_error > 1.01 * plain_key_error
    # Teeth: the feedback of other queries does not help.
    swapped = CODEC.fit(x)[:, ::-1]
    assert errors(CODEC.bind(swapped), x)[1] > plain_score_error


def test_without_queries_codes_are_kivi_s(getkey):
    x = sample(getkey())
    for params in (CODEC.init(kvq.CacheSpec(B, K, 64, H)), CODEC.fit(x._replace(q=None))):
        ours = CODEC.bind(params).encode(groups(x.x))
        jax.tree.map(np.testing.assert_array_equal, ours, Affine(2, (32, 1)).encode(groups(x.x)))


def test_feedback_is_the_best_answer_to_an_error(getkey):
    """No other change of the later channels has a smaller weighed error."""
    x = sample(getkey())
    feedback = CODEC.fit(x)[0, 0]
    q = np.asarray(x.q.reshape(B, T, K, G, H)[0, :, 0], np.float64).reshape(-1, H)
    weights = np.eye(H) + CODEC.weight * q.T @ q / len(q)  # of rank 6, all of it counts
    error = np.zeros(H)
    error[:32] = np.random.default_rng(0).normal(size=32)
    answer = error + error @ np.asarray(feedback, np.float64)
    assert (answer[:32] == error[:32]).all()
    gradient = (weights @ answer)[32:]
    np.testing.assert_allclose(gradient, 0, atol=2e-4 * np.abs(weights @ error).max())


def test_padding_does_not_count(getkey):
    x = sample(getkey())
    mask = x.mask.at[0, 25:].set(False)
    dirty = jnp.where(mask[..., None, None], x.q, jnp.nan)
    expected = CODEC.fit(Sample(x.x[:1, :25], mask[:1, :25], x.q[:1, :25]))
    np.testing.assert_allclose(
        CODEC.fit(Sample(x.x, mask, dirty))[0], expected[0], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("layout", ["plain", "hopper"])
def test_a_cache_fits_each_prompt_and_keeps_it(layout, getkey):
    x = sample(getkey())
    method = dataclasses.replace(kvq.squat(group_size=32, residual_length=0), layout=layout)
    state = method.init(kvq.CacheSpec(B, K, 128, H, jnp.float32))
    state = method.prefill(state, x.x, x.x, q=x.q)
    again = method.prefill(state, x.x[:, :1], x.x[:, :1], q=-x.q[:, :1])
    np.testing.assert_array_equal(again.fitted.key_codec, state.fitted.key_codec)
    expected = method.key_codec.fit(x)
    np.testing.assert_allclose(state.fitted.key_codec, expected, atol=1e-5)
    assert jnp.abs(expected).max() > 0.1
