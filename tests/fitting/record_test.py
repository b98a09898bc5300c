# SPDX-License-Identifier: Apache-2.0
"""Recordings: what a cache is given, and the gradients of what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.fitting.record import _Recorder, record
from kvq_jax.models import init_states
from kvq_jax.models.layers import apply_rope, rope_frequencies


@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_recorded_is_what_a_cache_gets(decoder, windows, gradients):
    tokens = jnp.asarray(windows[:1])
    states = init_states(decoder.config, kvq.dense(), 1, 96, jnp.float32)
    _, states = decoder(tokens, states, kvq.dense())
    positions = jnp.arange(96)[None]
    recorded = record(decoder, tokens, pre_rope=True, gradients=gradients, exact=5)
    for one, state in zip(recorded, states, strict=True):
        k = one.keys.swapaxes(1, 2)
        k = apply_rope(k, positions, rope_frequencies(decoder.config)).swapaxes(1, 2)
        np.testing.assert_allclose(k, state.keys, atol=1e-5)
        np.testing.assert_allclose(one.values, state.values, atol=1e-5)
        assert (one.key_gradient is not None) == (one.value_gradient is not None) == gradients
        assert one.queries is None


@pytest.mark.parametrize("pre_rope", [False, True])
def test_queries_are_recorded_if_they_are_asked_for(decoder, windows, pre_rope):
    """The first layer's, as its projection of the embedding gives them."""
    tokens, config = jnp.asarray(windows[:1]), decoder.config
    first = decoder.layers[0]
    x = first.attention_norm(decoder.embedding[...][tokens])
    q = first.attention.q_proj(x).reshape(1, 96, config.num_q_heads, config.head_dim)
    if not pre_rope:
        q = apply_rope(q, jnp.arange(96)[None], rope_frequencies(config))
    with_queries = record(decoder, tokens, pre_rope=pre_rope, gradients=True, queries=True)
    without = record(decoder, tokens, pre_rope=pre_rope, gradients=True)
    assert len(with_queries) == config.num_layers
    np.testing.assert_allclose(with_queries[0].queries.swapaxes(1, 2), q, atol=1e-5)
    for one, other in zip(with_queries, without, strict=True):
        assert np.isfinite(one.queries).all()
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
            one._replace(queries=None),
            other,
        )


@pytest.mark.parametrize("exact", [0, 12])
def test_gradients_are_those_of_what_is_seen_from_far(decoder, windows, exact):
    """By differences of the loss, with one number of a key or value moved."""
    tokens, at, step = jnp.asarray(windows[:1, :24]), (0, 1, 5, 3), 0.1
    recorder = _Recorder(exact, tuple(rope_frequencies(decoder.config).tolist()))

    def loss(layer, field, by):
        states = list(init_states(decoder.config, recorder, 1, 24, jnp.float32))
        moved = list(states[layer].added)
        moved[field] = moved[field].at[at].add(by)
        states[layer] = states[layer]._replace(added=tuple(moved))
        hidden, _ = decoder(tokens, tuple(states), recorder)
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).sum()

    recorded, all_of_it = (
        record(decoder, tokens, pre_rope=True, gradients=True, exact=n) for n in (exact, 0)
    )
    for layer, field in ((0, 0), (0, 1), (1, 1)):
        slope = (loss(layer, field, step) - loss(layer, field, -step)) / (2 * step)
        gradient = recorded[layer][3 + field][at]
        np.testing.assert_allclose(gradient, slope, rtol=0.02)
        assert abs(gradient) > 1e-3, "nothing was tested"
        assert exact == 0 or abs(gradient / all_of_it[layer][3 + field][at] - 1) > 0.05
    # The last query that the loss hangs on is at 22.
    for gradient in recorded[0][3:]:
        seen = (gradient[0] != 0).any((0, 2))
        np.testing.assert_array_equal(seen, np.arange(24) <= 22 - exact)
