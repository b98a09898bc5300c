# SPDX-License-Identifier: Apache-2.0
"""The plain layout: groups are read back where they were written, whatever the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.base import CacheSpec
from kvq_jax.codecs import Affine
from kvq_jax.kernels.decode_attention import plain

GROUP = 32
KEYS, VALUES = Affine(4, (GROUP, 1)), Affine(2, (1, GROUP))


def test_groups_of_ragged_rows_are_read_back():
    spec = CacheSpec(batch_size=3, num_kv_heads=2, capacity=512, head_dim=32, dtype=jnp.float32)
    segment = plain.init(spec, KEYS, VALUES, GROUP, num_tokens=4 * GROUP)
    segment = segment._replace(block_table=segment.block_table[::-1])
    write = jax.jit(plain.write_group, static_argnums=3)
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, 5, 3, 2, GROUP, 32), np.float32)
    chosen = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    expected = np.zeros((2, 3, 2, 4 * GROUP, 32), np.float32)
    done = np.zeros(3, int)
    for i in range(5):
        codes = KEYS.encode(jnp.asarray(k[i])), VALUES.encode(jnp.asarray(v[i]))
        segment = write(segment, *codes, GROUP, jnp.asarray(chosen[:, i]))
        for row in np.flatnonzero(chosen[:, i] & (done < 4)):  # a fifth group has no room
            at = np.s_[row, :, done[row] * GROUP : (done[row] + 1) * GROUP]
            expected[0][at] = KEYS.decode(codes[0], jnp.float32)[row]
            expected[1][at] = VALUES.decode(codes[1], jnp.float32)[row]
            done[row] += 1
    assert (segment.num_coded == done * GROUP).all()
    kv = plain.read(segment, KEYS, VALUES, jnp.float32)
    position = np.arange(4 * GROUP)
    held = position < done[:, None] * GROUP
    np.testing.assert_array_equal(kv.positions, np.where(held, position, -1)[:, None].repeat(2, 1))
    for name, x in zip(("keys", "values"), expected, strict=True):
        # In XLA's hands a product and a sum may be rounded once or twice.
        np.testing.assert_allclose(getattr(kv, name), x, rtol=0, atol=8 * 2.0**-24, err_msg=name)


@pytest.mark.parametrize("num_tokens", [0, 1, GROUP, 1000, 1024, 1025, 5000])
def test_blocks_waste_less_than_a_group_each(num_tokens):
    spec = CacheSpec(batch_size=2, num_kv_heads=1, capacity=1, head_dim=32, dtype=jnp.float32)
    segment = jax.eval_shape(lambda: plain.init(spec, KEYS, VALUES, GROUP, num_tokens))
    num_blocks = segment.block_table.shape[1]
    size = plain.block_size(segment, GROUP) if num_blocks else 0
    assert size <= plain.BLOCK_SIZE
    assert num_tokens <= num_blocks * size < num_tokens + (num_blocks + 1) * GROUP
