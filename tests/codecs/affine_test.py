# SPDX-License-Identifier: Apache-2.0
"""Affine codes: the error they promise, fixed points, holes, and what they refuse."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.codecs import Affine

S, H = 128, 64
TILES = [(32, 1), (128, 1), (1, 32), (1, 128), (16, 4)]  # the fourth is cut to (1, 64)
DTYPES = [jnp.float32, jnp.bfloat16]
every = pytest.mark.parametrize(
    "bits, tile",
    [
        pytest.param(b, t, id=f"{b}-{t}")
        for b, t in [*itertools.product((2, 4, 8), TILES), (1, (32, 1)), (3, (32, 1)), (5, (1, 32))]
    ],
)


def per_element(codec, x):
    """A tile's numbers, repeated for each of its elements."""
    tokens, channels = codec.tile[0], min(codec.tile[1], H)
    return np.repeat(np.repeat(np.asarray(x, np.float64), tokens, -2), channels, -1)


def sample(key, dtype=jnp.float32):
    """Channels of many sizes and offsets, as keys have."""
    a, b, c = jax.random.split(key, 3)
    size = 2.0 ** jax.random.randint(a, (H,), -6, 6).astype(jnp.float32)
    x = (jax.random.normal(b, (2, S, H)) + 4 * jax.random.normal(c, (H,))) * size
    return x.astype(dtype)


def check_error(codec, x):
    """|x - decoded| <= scale / 2, elementwise, by the scale that is stored."""
    code = codec.encode(x)
    x = np.asarray(x, np.float64)
    decoded = np.asarray(codec.decode(code, jnp.float32), np.float64)
    scale = per_element(codec, code.scale)
    minimum = per_element(codec, code.minimum)
    # Encoding rounds x - minimum and its quotient by scale, decoding field * scale and its sum
    # with the minimum: four roundings of numbers no larger than 2 |x| + 2 |minimum| + scale.
    rounding = 4 * 2.0**-24 * (2 * np.abs(x) + 2 * np.abs(minimum) + scale)
    assert (np.abs(x - decoded) <= scale / 2 + rounding).all()
    return code


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
def test_error_is_within_half_a_step(bits, tile, dtype, getkey):
    check_error(Affine(bits, tile), sample(getkey(), dtype))


@every
def test_steps_are_no_wider_than_the_range_demands(bits, tile, getkey):
    """Half a step of a huge scale would be a cheap promise."""
    codec, x = Affine(bits, tile), sample(getkey())
    code = codec.encode(x)
    tiles = np.asarray(codec._tiles(x), np.float64)
    low, high = tiles.min((-3, -1)), tiles.max((-3, -1))
    ulp = 2.0**-10  # of float16; below 2**-14 it is absolute
    widest = (high - low + ulp * np.abs(low) + 2.0**-24) / (2**bits - 1)
    assert (np.asarray(code.scale, np.float64) <= widest * (1 + ulp) + 2.0**-24).all()


@pytest.mark.parametrize("tile", [(32, 1), (1, 64)], ids=str)
def test_half_a_step_fails_for_what_is_wrong(tile, getkey):
    """Teeth: fewer levels, the next token's code or another minimum exceed the bound."""
    codec, x = Affine(2, tile), sample(getkey())
    code = codec.encode(x)
    scale = per_element(codec, code.scale)
    for wrong in (
        codec.decode(code._replace(words=code.words & jnp.uint32(0xAAAAAAAA)), jnp.float32),
        jnp.roll(codec.decode(code, jnp.float32), 1, axis=-2),
        codec.decode(code._replace(minimum=code.minimum + code.scale), jnp.float32),
    ):
        assert (np.abs(np.asarray(x, np.float64) - wrong) > 0.6 * scale).any()


@every
def test_decoded_is_a_fixed_point(bits, tile, getkey):
    """Where both ends of the range were met: else a tile's range shrinks and its step with it."""
    codec = Affine(bits, tile)
    levels = 2**bits - 1
    tokens, channels = tile[0], min(tile[1], H)
    shape = (2, S // tokens, tokens, H // channels, channels)
    field = jax.random.randint(getkey(), shape, 0, levels + 1).reshape(*shape[:2], -1, shape[3])
    field = field.swapaxes(-1, -2).at[..., 0].set(0).at[..., 1].set(levels)
    field = field.reshape(*shape[:2], shape[3], tokens, channels).swapaxes(2, 3)
    # Numbers that float16 and float32 hold without rounding.
    lead = (2, S // tokens, 1, H // channels, 1)
    scale = 2.0 ** jax.random.randint(getkey(), lead, -4, 4).astype(jnp.float32)
    offset = jax.random.randint(getkey(), lead, -20, 20).astype(jnp.float32)
    x = ((field.astype(jnp.float32) + offset) * scale).reshape(2, S, H)
    code = codec.encode(x)
    np.testing.assert_array_equal(codec.decode(code, jnp.float32), x)
    again = codec.encode(codec.decode(code, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, code, again)


@every
@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1 / 3, 60000.0, 1e-7], ids=str)
def test_constant_tiles(bits, tile, value):
    codec = Affine(bits, tile)
    code = check_error(codec, jnp.full((S, H), value))
    assert (code.scale != 0).all()  # 0 is what tells a hole
    if float(jnp.float16(value)) == value:
        assert (code.words == 0).all()
        assert (codec.decode(code, jnp.float32) == value).all()


@every
def test_extremes(bits, tile, getkey):
    """The ends of float16, its subnormals, and a tiny range on a large offset."""
    sign = jnp.where(jax.random.bernoulli(getkey(), shape=(S, H)), 1.0, -1.0)
    codec = Affine(bits, tile)
    for x in (30000 * sign, 1e-6 * sign, 1000 + 1e-3 * sign):
        check_error(codec, x)


@pytest.mark.parametrize("value", [1e6, jnp.inf, jnp.nan], ids=str)
def test_what_it_cannot_hold_spreads_as_nan(value, getkey):
    x = sample(getkey())[0].at[40, 3].set(value)
    codec = Affine(2, (32, 1))
    decoded = codec.decode(codec.encode(x), jnp.float32)
    assert not jnp.isfinite(decoded[32:64, 3]).any()
    assert jnp.isfinite(decoded.at[32:64, 3].set(0)).all()


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_holes(group, getkey):
    codec = Affine(4, (1, group))
    x, mask = sample(getkey()), jax.random.bernoulli(getkey(), 0.7, (2, S))
    code, full = codec.encode(x, mask), codec.encode(x)
    np.testing.assert_array_equal(codec.mask(code), mask)
    assert codec.mask(full).all()
    decoded = codec.decode(code, jnp.float32)
    expected = jnp.where(mask[..., None], codec.decode(full, jnp.float32), 0)
    np.testing.assert_array_equal(decoded, expected)
    assert not codec.mask(jax.tree.map(jnp.zeros_like, code)).any()


@pytest.mark.parametrize("tile", [(48, 1), (1, 48)], ids=str)
def test_refuses_odd_sizes(tile):
    with pytest.raises(ValueError, match="128 tokens and 64 channels can't be cut into tiles"):
        Affine(2, tile).encode(jnp.zeros((S, H)))


def test_refuses_tokens_that_do_not_fill_words():
    with pytest.raises(ValueError, match="24 tokens of 2 bits do not fill"):
        Affine(2, (8, 1)).encode(jnp.zeros((24, H)))


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        Affine(bits, (32, 1))


@every
def test_leading_axes_are_independent(bits, tile, getkey):
    codec, x = Affine(bits, tile), sample(getkey())
    first = jax.tree.map(lambda leaf: leaf[0], codec.encode(x))
    jax.tree.map(np.testing.assert_array_equal, codec.encode(x[0]), first)


def test_holes_need_scales_per_token():
    codec, x = Affine(2, tile=(32, 1)), jnp.ones((32, 4))
    for call in (
        lambda: codec.encode(x, jnp.ones(32, bool)),
        lambda: codec.mask(codec.encode(x)),
    ):
        with pytest.raises(ValueError, match=r"not by tiles of \(32, 1\)"):
            call()
