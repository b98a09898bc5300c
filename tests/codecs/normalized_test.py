# SPDX-License-Identifier: Apache-2.0
"""Normalized codes: what the factors are, what they help, and what they leave to the inner code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.codecs import Affine, Normalized

S, H = 32, 64
KEYS = {
    "rms": Normalized(Affine(2, (S, 1)), "token"),
    "balanced": Normalized(Affine(2, (S, 1)), "token", rounds=4),
}
every = pytest.mark.parametrize("codec", KEYS.values(), ids=KEYS)


def sample(key):
    """Channels of different size, and tokens of very different size."""
    a, b, c = jax.random.split(key, 3)
    tokens, channels = (
        jnp.exp(jax.random.normal(k, shape)) for k, shape in ((a, (3, S, 1)), (b, (H,)))
    )
    return jax.random.normal(c, (3, S, H)) * tokens * channels


def relative_error(codec, x):
    """Of each token."""
    error = codec.decode(codec.encode(x), jnp.float32) - x
    return jnp.linalg.norm(error, axis=-1) / jnp.linalg.norm(x, axis=-1)


@every
def test_small_tokens_are_coded_as_well_as_large_ones(codec, getkey):
    x = sample(getkey())
    worst = relative_error(codec, x).max()
    assert worst < 0.75
    assert relative_error(codec.codec, x).max() > 2 * worst


def test_rms_is_the_size_of_each_token(getkey):
    x = sample(getkey())
    factor = KEYS["rms"].encode(x).factor[..., 0]
    np.testing.assert_allclose(factor, np.sqrt(np.square(x).mean(-1)), rtol=2**-10)


def test_balancing_makes_deviations_even(getkey):
    x = sample(getkey())
    token = Normalized(Affine(2, (S, 1)), "token", rounds=4).encode(x).factor
    channel = Normalized(Affine(2, (1, H)), "channel", rounds=4).encode(x).factor
    even = np.asarray(x) / np.asarray(token) / np.asarray(channel)
    for axis in (-1, -2):
        deviation, alone = even.std(axis), np.asarray(x).std(axis)
        assert (deviation.max(-1) / deviation.min(-1) < 1.1).all()
        assert (alone.max(-1) / alone.min(-1) > 4).all()


@every
def test_groups_are_coded_together_as_alone(codec, getkey):
    x = sample(getkey())
    together = jax.jit(codec.encode)(x)
    alone = [jax.jit(codec.encode)(group) for group in x]
    alone = jax.tree.map(lambda *groups: jnp.stack(groups), *alone)
    jax.tree.map(np.testing.assert_array_equal, together, alone)


def test_zeros_and_holes(getkey):
    codec = Normalized(Affine(4, (1, H)), "channel", rounds=2)
    decoded = codec.decode(codec.encode(jnp.zeros((S, H))), jnp.float32)
    np.testing.assert_array_equal(decoded, 0)
    mask = jax.random.bernoulli(getkey(), 0.7, (3, S))
    code = codec.encode(sample(getkey()), mask)
    np.testing.assert_array_equal(codec.mask(code), mask)
    assert (codec.decode(code, jnp.float32)[~mask] == 0).all()


@pytest.mark.parametrize("value", [jnp.inf, jnp.nan], ids=str)
@every
def test_what_is_not_finite_spreads(codec, value, getkey):
    x = sample(getkey()).at[0, 5, 7].set(value)
    decoded = codec.decode(codec.encode(x), jnp.float32)
    assert not jnp.isfinite(decoded[0, 5]).any()
    assert jnp.isfinite(decoded[1:]).all()


def test_refuses_other_arguments(as_users_run_it):
    with pytest.raises(ValueError, match='axis must be "token" or "channel"'):
        Normalized(Affine(2, (S, 1)), "head")
    with pytest.raises(ValueError, match="rounds must be at least 0"):
        Normalized(Affine(2, (S, 1)), "token", -1)
