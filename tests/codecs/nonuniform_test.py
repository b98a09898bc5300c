# SPDX-License-Identifier: Apache-2.0
"""Fitted levels and outliers apart: nearest levels, what is stored exactly, holes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs import Affine
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.nonuniform import Nonuniform

B, K, N, S, H = 2, 2, 3, 32, 64
SPEC = kvq.CacheSpec(1, K, 64, H)
every = pytest.mark.parametrize("per", ["channel", "token"])


def draw(key, *shape):
    """Heavy tails on channels of their own size and offset."""
    ks, kx = jax.random.split(key)
    size = jnp.exp(jax.random.normal(jax.random.key(5), (K, 1, H)))
    offset = 2 * jax.random.normal(jax.random.key(6), (K, 1, H))
    x = jax.random.normal(kx, (*shape, H))
    x = x * jnp.where(jax.random.uniform(ks, x.shape) < 0.01, 8.0, 1.0)
    per_head = (K, *[1] * (len(shape) - 2), H)
    return x * size.reshape(per_head) + offset.reshape(per_head)


def sample(key):
    x = draw(key, 1, K, 2048).swapaxes(1, 2)
    return Sample(x, jnp.ones(x.shape[:2], bool))


def fitted(codec, key):
    return codec.bind(codec.fit(sample(key)))


def error(codec, x):
    return float(jnp.square(codec.decode(jax.jit(codec.encode)(x), jnp.float32) - x).mean())


@every
def test_parameters_have_the_shapes_of_an_empty_cache(per, getkey):
    codec = Nonuniform(2, per)
    shapes = [jax.tree.map(lambda x: x.shape, p) for p in (codec.fit(sample(getkey())),
                                                         codec.init(SPEC))]  # fmt: skip
    assert shapes[0] == shapes[1]


@every
def test_outliers_and_fitted_levels_each_help(per, getkey):
    x = draw(getkey(), B, K, N, S)
    key = getkey()
    both = error(fitted(Nonuniform(2, per), key), x)
    dense = error(fitted(Nonuniform(2, per, outliers=0.0), key), x)
    even = error(Affine(2, (32, 1) if per == "channel" else (1, H)), x)
    assert both < 0.9 * dense
    assert both < 0.9 * even


@every
def test_outliers_are_exact_and_the_rest_is_at_the_nearest_level(per, getkey):
    codec = fitted(Nonuniform(3, per), getkey())
    x = draw(getkey(), B, K, N, S)
    code = codec.encode(x)
    decoded = np.asarray(codec.decode(code, jnp.float32))
    index = np.asarray(code.channel, np.int32)
    stored = np.asarray(code.extra) != 0
    at = np.take_along_axis(np.asarray(x), index, -1), np.take_along_axis(decoded, index, -1)
    np.testing.assert_allclose(at[1][stored], at[0][stored], rtol=2e-3, atol=2e-3)
    assert stored.mean() > (0.2 if per == "channel" else 0.9)
    levels, center, scale = codec.params
    if per == "token":
        center, scale = (np.asarray(y, np.float32) for y in (code.center, code.scale))
    else:
        center, scale = (np.asarray(y).reshape(1, K, 1, 1, H) for y in (center, scale))
    table = np.asarray(levels[0]) * scale[..., None] + center[..., None]
    least = np.abs(np.asarray(x)[..., None] - table).min(-1)
    off = np.abs(np.asarray(x) - decoded)
    assert (off <= least + 1e-4 + 2e-3 * np.abs(decoded)).all()


def test_holes_and_what_is_not_finite(getkey):
    codec = fitted(Nonuniform(3, "token"), getkey())
    x = draw(getkey(), B, K, N, S).at[1, 0, 2, 7, 3].set(jnp.nan)
    mask = jax.random.bernoulli(getkey(), 0.7, x.shape[:-1])
    code, full = codec.encode(x, mask), codec.decode(codec.encode(x), jnp.float32)
    np.testing.assert_array_equal(codec.mask(code), mask)
    np.testing.assert_array_equal(
        codec.decode(code, jnp.float32), jnp.where(mask[..., None], full, 0)
    )
    assert jnp.isnan(full[1, 0, 2, 7]).any()
    assert jnp.isfinite(full.at[1, 0, 2, 7].set(0)).all()
    assert codec.mask(codec.encode(jnp.zeros_like(x))).all()
    keys = fitted(Nonuniform(3, "channel"), getkey())
    decoded = keys.decode(keys.encode(x), jnp.float32)
    assert jnp.isnan(decoded[1, 0, 2, 7]).any()
    for call in (lambda: keys.encode(x, mask), lambda: keys.mask(keys.encode(x))):
        with pytest.raises(ValueError, match="ranges of tokens, not of channels"):
            call()


def test_keep_deviation_does(getkey):
    x, kept = sample(getkey()), []
    for keep in (False, True):
        codec = Nonuniform(2, "channel", keep_deviation=keep)
        codec = codec.bind(codec.fit(x))
        _, center, scale = codec.params
        unit = jnp.clip((x.x - center[:, None]) / scale[:, None], -1, 1)
        levels = codec.params[0][0]
        coded = levels[jnp.abs(unit[..., None] - levels).argmin(-1)]
        kept.append(abs(float(coded.std() / unit.std()) - 1))
    assert kept[1] < 0.7 * kept[0]  # not 0: numbers change levels as these move


def test_weights_draw_levels(getkey):
    x = sample(getkey())
    heavy = x._replace(gradient=jnp.where(x.x > 0, 10.0, 1.0))
    codec = Nonuniform(3, "token", keep_deviation=False)
    assert codec.fit(heavy)[0].mean() > codec.fit(x)[0].mean() + 0.05


def test_refuses_what_makes_no_sense(as_users_run_it):
    for arguments, message in (
        ((9, "token"), "bits must be one of"),
        ((2, "head"), 'per must be "channel" or "token"'),
        ((2, "token", 0.5), "outliers must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            Nonuniform(*arguments)
    with pytest.raises(ValueError, match="head_dim=512 > 256"):
        Nonuniform(2, "token").init(kvq.CacheSpec(1, 1, 64, 512))
