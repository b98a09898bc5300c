# SPDX-License-Identifier: Apache-2.0
"""Latent codes: the basis, the bands, and what they save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs import Affine
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.latent import Latent

B, T, K, H = 2, 128, 2, 32
SCHEDULE = (4, 4, 2, 2, 2, 2, 0, 0)
both = pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])


def sample(key):
    """Keys with a mean, and spreads that fall along directions that heads share."""
    kx, kb, km = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(kb, (B, K * H, K * H)))[0]
    spread = jnp.exp(-jnp.arange(K * H) / 8)
    x = jax.random.normal(kx, (B, T, K * H)) * spread @ basis.swapaxes(1, 2)
    x = (x + jax.random.normal(km, (K * H,))).reshape(B, T, K, H)
    return Sample(x, jnp.ones((B, T), bool))


def groups(x):
    return x.swapaxes(1, 2).reshape(B, K, -1, 32, H)


def error(codec, x):
    keys = groups(x)
    decoded = codec.decode(jax.jit(codec.encode)(keys), jnp.float32)
    return float(jnp.linalg.norm(decoded - keys))


@both
def test_two_bits_beat_three_of_single_channels(joint, getkey):
    x = sample(getkey())
    codec = Latent(SCHEDULE, 32, joint)
    assert error(codec.bind(codec.fit(x)), x.x) < error(Affine(3, (32, 1)), x.x)
    # Teeth: the bands in another order do not.
    mean, basis = codec.fit(x)
    assert error(codec.bind((mean, basis[..., ::-1])), x.x) > error(Affine(3, (32, 1)), x.x)


@both
def test_basis_is_of_falling_variance(joint, getkey):
    x = sample(getkey())
    mean, basis = Latent(SCHEDULE, 32, joint).fit(x)
    for row in range(B):
        keys = np.asarray(x.x[row], np.float64)
        keys = keys.reshape(T, 1, -1) if joint else keys
        for head in range(keys.shape[1]):
            np.testing.assert_allclose(mean[row, head], keys[:, head].mean(0), atol=1e-5)
            spread = np.linalg.svd(keys[:, head] - keys[:, head].mean(0), compute_uv=False)
            z = (keys[:, head] - np.asarray(mean[row, head])) @ np.asarray(basis[row, head])
            np.testing.assert_allclose(np.linalg.norm(z, axis=0), spread, rtol=1e-3, atol=1e-2)


@both
def test_all_bits_lose_next_to_nothing(joint, getkey):
    x = sample(getkey())
    codec = Latent((8,) * 8, 32, joint)
    assert error(codec.bind(codec.fit(x)), x.x) < 0.01 * np.linalg.norm(x.x)


def test_dropped_bands_leave_the_mean(getkey):
    x = sample(getkey())
    codec = Latent((8, 0, 0, 0, 0, 0, 0, 0), 32)
    mean, basis = codec.fit(x)
    decoded = codec.bind((mean, basis)).decode(
        codec.bind((mean, basis)).encode(groups(x.x)), jnp.float32
    )
    decoded = decoded.reshape(B, K, T, H).swapaxes(1, 2).reshape(B, T, -1)
    kept = basis[:, 0, :, : K * H // 8]
    expected = mean + (x.x.reshape(B, T, -1) - mean) @ kept @ kept.swapaxes(1, 2)
    np.testing.assert_allclose(decoded, expected, atol=0.05)


def test_padding_does_not_count(getkey):
    x = sample(getkey())
    mask = x.mask.at[0, 90:].set(False)
    dirty = jnp.where(mask[..., None, None], x.x, jnp.nan)
    mean, basis = Latent(SCHEDULE, 32, joint=False).fit(Sample(dirty, mask))
    alone = Latent(SCHEDULE, 32, joint=False).fit(Sample(x.x[:1, :90], mask[:1, :90]))
    np.testing.assert_allclose(mean[0], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(np.abs(basis[0, ..., 0]), np.abs(alone[1][0, ..., 0]), atol=1e-3)


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="some band must have bits"):
        kvq.svdq(schedule=(0, 0))
    with pytest.raises(ValueError, match="bits must be one of"):
        kvq.svdq(schedule=(16, 0))
    spec = kvq.CacheSpec(1, 1, 256, 32, rope=(1.0,) * 16)
    with pytest.raises(ValueError, match="3 bands do not divide head_dim=32"):
        kvq.svdq(schedule=(4, 2, 1)).init(spec)
    with pytest.raises(ValueError, match="rope must say how"):
        kvq.svdq().init(kvq.CacheSpec(1, 1, 256, 32))
