# SPDX-License-Identifier: Apache-2.0
"""Table codes: the nearest level, holes, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.codecs import Table, lloyd_max, normal_float, symmetric

S, H = 64, 64
CODECS = {
    "nf4": Table(4, (1, 64), levels=normal_float(4)),
    "nf3": Table(3, (1, 16), levels=normal_float(3)),
    "int4": Table(4, (32, 1), levels=symmetric(4)),
    "lloyd2": Table(2, (1, 128), levels=lloyd_max(2), size="rms"),
}
every = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def sample(key):
    size = 2.0 ** jax.random.randint(key, (2, S, 1), -6, 6).astype(jnp.float32)
    return jax.random.normal(key, (2, S, H)) * size


def scales(codec, code):
    """A tile's scale, repeated for each of its elements."""
    tokens, channels = codec.tile[0], min(codec.tile[1], H)
    return np.repeat(np.repeat(np.asarray(code.scale, np.float64), tokens, -2), channels, -1)


@every
def test_takes_the_nearest_level(codec, getkey):
    x = sample(getkey())
    code = codec.encode(x)
    scale = scales(codec, code)
    error = np.abs(np.asarray(x)[..., None] - scale[..., None] * np.array(codec.levels))
    decoded = np.asarray(codec.decode(code, jnp.float32))
    rounding = 1e-6 * scale
    assert (np.abs(np.abs(x - decoded) - error.min(-1)) < rounding).all()
    assert (np.abs(x - np.roll(decoded, 1, -1)) > error.min(-1) + rounding).any()


@every
def test_scale_is_the_size_of_the_tile(codec, getkey):
    x = sample(getkey())
    tiles = np.asarray(codec._tiles(x), np.float64)
    scale = np.asarray(codec.encode(x).scale, np.float64)
    if codec.size == "max":
        size = np.abs(tiles).max((-3, -1))
        assert (scale >= size).all()  # outward: nothing clips
    else:
        size = np.sqrt(np.square(tiles).mean((-3, -1)))
    np.testing.assert_allclose(scale, size, rtol=2**-9)


@pytest.mark.parametrize("name", ["nf4", "nf3", "int4"])  # "rms" is another of what is decoded
def test_decoded_is_a_fixed_point(name, getkey):
    codec = CODECS[name]
    decoded = codec.decode(codec.encode(sample(getkey())), jnp.float32)
    again = codec.decode(codec.encode(decoded), jnp.float32)
    np.testing.assert_allclose(decoded, again, rtol=2**-9)


@every
def test_zeros_are_no_holes(codec):
    code = jax.jit(codec.encode)(jnp.zeros((S, H)))
    assert (code.scale != 0).all()
    assert np.abs(codec.decode(code, jnp.float32)).max() < 1e-6


@every
@pytest.mark.parametrize("value", [jnp.inf, jnp.nan], ids=str)
def test_what_is_not_finite_spreads(codec, value, getkey):
    x = sample(getkey())[0].at[40, 3].set(value)
    decoded = codec.decode(codec.encode(x), jnp.float32)
    tile = codec._tiles(jnp.zeros_like(x).at[40, 3].set(1))
    tile = jnp.broadcast_to(tile.max((-3, -1), keepdims=True), tile.shape).reshape(x.shape) == 1
    assert not jnp.isfinite(decoded[tile]).any()
    assert jnp.isfinite(decoded[~tile]).all()


def test_holes(getkey):
    codec = CODECS["nf4"]
    x, mask = sample(getkey()), jax.random.bernoulli(getkey(), 0.7, (2, S))
    code, full = codec.encode(x, mask), codec.encode(x)
    np.testing.assert_array_equal(codec.mask(code), mask)
    assert codec.mask(full).all()
    expected = jnp.where(mask[..., None], codec.decode(full, jnp.float32), 0)
    np.testing.assert_array_equal(codec.decode(code, jnp.float32), expected)
    assert not codec.mask(jax.tree.map(jnp.zeros_like, code)).any()
    with pytest.raises(ValueError, match=r"not by tiles of \(32, 1\)"):
        CODECS["int4"].encode(x, mask)


def test_refuses_levels_that_are_no_table():
    for levels in (normal_float(4), (0.0, 1.0, -1.0)):
        with pytest.raises(ValueError, match="levels must ascend and be at most 8"):
            Table(3, (1, 64), levels=levels)


def test_normal_float_beats_even_levels_on_normal_numbers(getkey):
    x = jax.random.normal(getkey(), (512, H))
    errors = [
        jnp.square(codec.decode(codec.encode(x), jnp.float32) - x).mean()
        for codec in (
            CODECS["lloyd2"],
            Table(2, (1, 64), levels=normal_float(2)),
            Table(2, (1, 64), levels=symmetric(2)),
        )
    ]
    assert errors[0] < errors[1] < errors[2]
