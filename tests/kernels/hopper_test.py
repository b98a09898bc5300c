# SPDX-License-Identifier: Apache-2.0
"""The hopper layout against its own description, element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax import CacheSpec
from kvq_jax.codecs import Affine
from kvq_jax.codecs.feedback import Feedback
from kvq_jax.kernels.decode_attention import hopper

CASES = [
    # bits, head_dim, group_size, channels of a value scale
    (2, 64, 32, 32),
    (2, 128, 128, 128),
    (2, 256, 64, 64),
    (4, 64, 64, 64),
    (4, 128, 32, 32),
    (8, 64, 32, 32),
    (8, 256, 128, 128),
]
every_case = pytest.mark.parametrize("bits, head_dim, group_size, channels", CASES)


def encode(bits, head_dim, group_size, channels, lead=(2,)):
    shape = (2, *lead, group_size, head_dim)
    k, v = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    keys = Affine(bits, (group_size, 1))
    values = Affine(bits, (1, channels))
    return jax.jit(lambda: (keys.encode(k), values.encode(v)))()


def plain_field(words, bits, token, channel):
    """A field in the planar order of `kvq_jax.packing`."""
    plane, row = divmod(token, words.shape[0])
    return int(words[row, channel]) >> (bits * plane) & (2**bits - 1)


@every_case
def test_elements_lie_where_the_description_says(bits, head_dim, group_size, channels):
    codes = encode(bits, head_dim, group_size, channels, lead=())
    tiled = jax.jit(hopper.from_codes)(*codes)
    fields = 16 // bits
    across = min(fields, head_dim // 16)  # tiles along the channels that share words
    for of_values in (False, True):
        stored = np.asarray(codes[of_values].words)
        words = np.asarray(tiled[of_values].words)
        random = np.random.default_rng(1)
        for _ in range(200):
            index = int(random.integers(group_size * head_dim * bits // 32))
            field, e = int(random.integers(fields)), int(random.integers(2))
            load, lane, i = index // 128, index // 4 % 32, index % 4
            g, t = divmod(lane, 4)
            along, tile = divmod(field, across)
            loads_across = head_dim // (16 * across)
            tile += load % loads_across * across
            token = 16 * (load // loads_across * (fields // across) + along)
            if of_values:
                token += 2 * t + e + 8 * (i // 2)
                channel = 32 * (tile // 2) + 8 * (g // 2) + 4 * (tile % 2) + 2 * (i % 2) + g % 2
            else:
                token += g + 8 * (i % 2)
                channel = 32 * (tile // 2) + 8 * t + 4 * (tile % 2) + 2 * (i // 2) + e
            here = int(words[index]) >> (16 * e + bits * field) & (2**bits - 1)
            assert here == plain_field(stored, bits, token, channel)


@every_case
def test_codes_come_back(bits, head_dim, group_size, channels):
    codes = encode(bits, head_dim, group_size, channels, lead=(2, 3))
    codecs = Affine(bits, (group_size, 1)), Affine(bits, (1, channels))
    back = jax.jit(lambda *x: hopper.to_codes(*hopper.from_codes(*x), *codecs))(*codes)
    for was, now in zip(jax.tree.leaves(codes), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(was, now)


def test_scales_follow_the_fields():
    keys, values = encode(2, 64, 32, 32, lead=())
    tiled = hopper.from_codes(keys, values)
    rows = np.asarray(tiled[0].words)[128:].view(np.float16)
    np.testing.assert_array_equal(rows, np.concatenate([keys.scale[0], keys.minimum[0]]))
    pairs = np.asarray(tiled[1].words)[128:].view(np.float16).reshape(32, 2, 2)
    np.testing.assert_array_equal(pairs, np.stack([values.scale, values.minimum], -1))


def test_takes_no_more_bytes_than_the_codes():
    codes = encode(2, 128, 64, 64)
    tiled = jax.jit(hopper.from_codes)(*codes)
    assert sum(x.nbytes for x in jax.tree.leaves(tiled)) == sum(
        x.nbytes for x in jax.tree.leaves(codes)
    )


@pytest.mark.parametrize(
    "head_dim, group_size, keys, values, reason",
    [
        (128, 32, Affine(2, (32, 1)), Affine(2, (1, 32)), None),
        (32, 32, Affine(2, (32, 1)), Affine(2, (1, 32)), "head_dim must be one of"),
        (64, 16, Affine(2, (16, 1)), Affine(2, (1, 64)), "group_size must be one of"),
        (64, 32, Affine(2, (32, 1)), Affine(2, (1, 16)), "multiple of 32 channels, not 16"),
        (64, 32, Affine(3, (32, 1)), Affine(2, (1, 32)), "codes must be of (2, 4, 8) bits, not 3"),
        (64, 32, Feedback(2, (32, 1)), Affine(2, (1, 32)), None),
        (64, 32, Affine(2, (1, 32)), Affine(2, (1, 32)), "keys must be coded per channel"),
        (64, 32, Affine(2, (32, 1), jnp.bfloat16), Affine(2, (1, 32)), "scales must be float16"),
    ],
)
def test_says_what_it_can_not_hold(head_dim, group_size, keys, values, reason):
    spec = CacheSpec(1, 1, 1024, head_dim, jnp.bfloat16)
    given = hopper.reason_against(spec, keys, values, group_size)
    assert (given is None) if reason is None else (reason in str(given))
