# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.models import attention


def attend_by_hand(q, k, v, window):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("block", [4, 512])
def test_causal_attention_by_hand(monkeypatch, window, block):
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    q = jax.random.normal(jax.random.key(0), (2, 11, 6, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 11, 3, 8))
    out = attention.causal_attention(q, k, v, sliding_window=window)
    # Sums of at most 11 terms of size 1 in float32.
    np.testing.assert_allclose(out, attend_by_hand(q, k, v, window), atol=1e-5)
    wrong = attention.causal_attention(q, v, k, sliding_window=window)
    assert np.abs(wrong - out).max() > 0.1


def test_causal_attention_keeps_bfloat16():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 2, 8), jnp.bfloat16)
    out = attention.causal_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    # Weights and values rounded to 8 bits.
    np.testing.assert_allclose(out.astype(jnp.float32), attend_by_hand(q, k, v, None), atol=2**-6)
