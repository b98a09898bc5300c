# SPDX-License-Identifier: Apache-2.0
"""The tpu layout against its own description, element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax import CacheSpec
from kvq_jax.base import CodedSegment
from kvq_jax.codecs import Affine
from kvq_jax.codecs.feedback import Feedback
from kvq_jax.kernels.decode_attention import plain, tpu

CASES = [
    # bits of keys and values, head_dim, group_size, channels of a value scale
    (2, 2, 128, 128, 128),
    (2, 4, 64, 32, 32),
    (8, 2, 64, 128, 64),
    (4, 2, 256, 64, 128),
    (2, 8, 256, 32, 256),
    (4, 4, 128, 32, 64),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
NUM_TILES = 2


def codecs(case):
    key_bits, value_bits, _, group_size, channels = case
    return Affine(key_bits, (group_size, 1)), Affine(value_bits, (1, channels))


def encode(case, lead=()):
    """Codes of the groups of a block."""
    _, _, head_dim, group_size, _ = case
    num_groups = NUM_TILES * tpu.tile_tokens(head_dim) // group_size
    shape = (2, *lead, num_groups, group_size, head_dim)
    k, v = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    keys, values = codecs(case)
    return jax.jit(lambda: (keys.encode(k), values.encode(v)))()


def plain_field(words, bits, token, channel):
    """A field in the planar order of `kvq_jax.packing`."""
    group, token = divmod(token, words.shape[1] * 32 // bits)
    plane, row = divmod(token, words.shape[1])
    return int(words[group, row, channel]) >> (bits * plane) & (2**bits - 1)


@every_case
def test_elements_lie_where_the_description_says(case):
    codes = encode(case)
    head_dim, group_size = case[2:4]
    halves, chunks = max(1, 128 // head_dim), max(1, head_dim // 128)
    arranged = jax.jit(tpu.from_codes)(*codes)
    random = np.random.default_rng(1)
    for of_values in (False, True):
        bits = case[of_values]
        fields = np.asarray(codes[of_values].words)
        stored = np.asarray(arranged[of_values].words)
        rows = 4 * bits  # of words of 128 x 128 fields
        operands = 2 if bits == 4 else 4
        scales = stored[NUM_TILES * chunks * rows :].view(np.float16).reshape(-1, 128, 2)
        for _ in range(200):
            tile, chunk, p, lane = (int(random.integers(n)) for n in (NUM_TILES, chunks, 128, 128))
            row, e, field = p % (rows * operands) // operands, p % operands, p // (rows * operands)
            word = int(stored[(tile * chunks + chunk) * rows + row, lane])
            here = word >> (32 // operands * e + bits * field) & (2**bits - 1)
            token, across = (p, lane) if of_values else (lane, p)
            half, channel = divmod(across, head_dim) if halves > 1 else (0, across + 128 * chunk)
            token += (tile * halves + half) * 128
            assert here == plain_field(fields, bits, token, channel)
            group, within = divmod(token, group_size)
            if of_values:
                width = min(case[4], head_dim)
                pair = (codes[1].scale, codes[1].minimum)
                expected = [x[group, within, channel // width] for x in pair]
                index = (channel // width * NUM_TILES + tile) * halves + half
                found = scales[index, p]
            else:
                expected = [x[group, 0, channel] for x in (codes[0].scale, codes[0].minimum)]
                group = token % 128 // group_size
                found = scales[(group * chunks + chunk) * NUM_TILES + tile, p]
            np.testing.assert_array_equal(found, expected)


@every_case
def test_codes_come_back(case):
    codes = encode(case, lead=(2, 3))
    back = jax.jit(lambda *x: tpu.to_codes(*tpu.from_codes(*x), *codecs(case)))(*codes)
    jax.tree.map(np.testing.assert_array_equal, codes, back)


@every_case
def test_takes_no_more_bytes_than_the_codes(case):
    codes = encode(case)
    arranged = jax.jit(tpu.from_codes)(*codes)
    assert sum(x.nbytes for x in jax.tree.leaves(arranged)) == sum(
        x.nbytes for x in jax.tree.leaves(codes)
    )


@every_case
def test_written_in_pieces_it_is_the_same(case):
    codes = encode(case, lead=(2, 3))
    whole = jax.jit(tpu.from_codes)(*codes)
    num_groups = codes[0].words.shape[2]
    table = jnp.array([[1], [0]], jnp.int32)
    segment = CodedSegment(
        *jax.tree.map(jnp.zeros_like, whole), table, num_coded=jnp.zeros(2, jnp.int32)
    )
    write = jax.jit(plain.write_groups, static_argnums=3)
    random, done = np.random.default_rng(1), np.zeros(2, int)
    while done.min() < num_groups:
        size = int(random.choice([1, 5]))
        count = np.minimum(random.integers(0, size + 1, 2), num_groups - done)
        index = np.minimum(done[:, None] + np.arange(size), num_groups - 1)[:, None, :, None, None]
        some = jax.tree.map(lambda x, i=index: jnp.take_along_axis(x, jnp.asarray(i), 2), codes)
        segment = write(segment, *some, case[3], jnp.asarray(count, jnp.int32))
        done += count
    np.testing.assert_array_equal(segment.num_coded, num_groups * case[3])
    stored = jax.tree.map(lambda x: x[table[:, 0]], (segment.keys, segment.values))
    jax.tree.map(np.testing.assert_array_equal, whole, stored)


@pytest.mark.parametrize("num_tokens", [100, 1500, 8192, 20_000, 32_608, 131_072])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_have_room_and_waste_little(num_tokens, head_dim):
    spec = CacheSpec(3, 2, num_tokens, head_dim, jnp.bfloat16)
    codec = Affine(2, (128, 1)), Affine(2, (1, 128))
    coded = jax.eval_shape(lambda: plain.init(spec, *codec, 128, num_tokens, "tpu"))
    size = plain.block_size(coded, 128)
    assert size <= max(1024, num_tokens / 4)
    room = size * coded.block_table.shape[1]
    assert num_tokens <= room < num_tokens * 1.08 + tpu.tile_tokens(head_dim)
    assert coded.keys.words.shape[:2] == (3 * coded.block_table.shape[1], 2)


@pytest.mark.parametrize(
    "head_dim, group_size, keys, values, reason",
    [
        (128, 32, Affine(2, (32, 1)), Affine(2, (1, 16)), None),
        (32, 32, Affine(2, (32, 1)), Affine(2, (1, 32)), "head_dim must be one of"),
        (64, 16, Affine(2, (16, 1)), Affine(2, (1, 64)), "group_size must be one of"),
        (64, 32, Affine(2, (32, 1)), Affine(2, (1, 48)), "a divisor of 64, not 48"),
        (64, 32, Affine(3, (32, 1)), Affine(2, (1, 32)), "codes must be of (2, 4, 8) bits, not 3"),
        (64, 32, Feedback(2, (32, 1)), Affine(2, (1, 32)), None),
        (64, 32, Affine(2, (1, 32)), Affine(2, (1, 32)), "keys must be coded per channel"),
        (64, 32, Affine(2, (32, 1), jnp.bfloat16), Affine(2, (1, 32)), "scales must be float16"),
    ],
)
def test_says_what_it_can_not_hold(head_dim, group_size, keys, values, reason):
    spec = CacheSpec(1, 1, 1024, head_dim, jnp.bfloat16)
    given = tpu.reason_against(spec, keys, values, group_size)
    assert (given is None) if reason is None else (reason in str(given))
    if reason:
        with pytest.raises(ValueError, match="the tpu layout can't hold these codes"):
            plain.init(spec, keys, values, group_size, 1024, "tpu")
