# SPDX-License-Identifier: Apache-2.0
"""The definition of attention, against `jax.nn.dot_product_attention` and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.base import KV
from kvq_jax.kernels.decode_attention import reference


def by_hand(**changes):
    """Two tokens of one channel, scores 0 and ln 3, so weights 1/4 and 3/4; values 1 and 5."""
    arguments = dict(
        q=jnp.full((1, 1, 1, 1), 2.0),
        keys=jnp.asarray([0, np.log(3)], jnp.float32).reshape(1, 1, 2, 1),
        values=jnp.asarray([1.0, 5.0]).reshape(1, 1, 2, 1),
        positions=jnp.asarray([[[0, 1]]], jnp.int32),
        length=jnp.asarray([2], jnp.int32),
        sliding_window=None,
    )
    arguments.update(changes)
    q, length, window = (arguments.pop(x) for x in ("q", "length", "sliding_window"))
    out = reference.attention(q, KV(**arguments), length, sm_scale=0.5, sliding_window=window)
    return np.asarray(out).ravel()


def test_numbers_by_hand():
    near = dict(rtol=1e-6)
    np.testing.assert_allclose(by_hand(), [4.0], **near)
    np.testing.assert_allclose(by_hand(sliding_window=1), [5.0], **near)
    np.testing.assert_allclose(by_hand(sliding_window=2), [4.0], **near)
    # The slots' order is no matter, only their positions; what stands at -1 is not there.
    np.testing.assert_allclose(by_hand(positions=jnp.asarray([[[1, 0]]])), [4.0], **near)
    np.testing.assert_allclose(by_hand(positions=jnp.asarray([[[0, -1]]])), [1.0], **near)
    np.testing.assert_array_equal(by_hand(positions=jnp.asarray([[[-1, -1]]])), [0.0])
    # The first of two queries does not see the second token.
    np.testing.assert_allclose(by_hand(q=jnp.full((1, 2, 1, 1), 2.0)), [1.0, 4.0], **near)
    # A token of the future is not seen.
    np.testing.assert_allclose(by_hand(length=jnp.asarray([1])), [1.0], **near)


def test_large_scores_do_not_overflow():
    assert by_hand(q=jnp.full((1, 1, 1, 1), 1e4)) == [5.0]


@pytest.mark.parametrize(
    "num_q_heads, num_kv_heads, num_tokens, sliding_window",
    [(4, 4, 5, None), (6, 2, 1, None), (6, 2, 5, 7), (4, 1, 5, None), (4, 1, 1, 7)],
)
def test_is_jax_attention(num_q_heads, num_kv_heads, num_tokens, sliding_window, getkey):
    lengths, slots, head_dim = np.array([40, 12, 5]), 40, 16
    k, v = (jax.random.normal(getkey(), (3, slots, num_kv_heads, head_dim)) for _ in "kv")
    q = jax.random.normal(getkey(), (3, num_tokens, num_q_heads, head_dim))
    at = lengths[:, None] - num_tokens + np.arange(num_tokens)
    distance = at[:, None, :, None] - np.arange(slots)
    mask = distance >= 0
    if sliding_window is not None:
        mask &= distance < sliding_window
    expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask))

    shuffle = jax.random.permutation(getkey(), slots)
    positions = jnp.where(shuffle < lengths[:, None], shuffle, -1)[:, None].astype(jnp.int32)
    kv = KV(*(x[:, shuffle].swapaxes(1, 2) for x in (k, v)), positions)
    out = reference.attention(
        q, kv, jnp.asarray(lengths, jnp.int32), sm_scale=0.25, sliding_window=sliding_window
    )
    # Sums of up to 40 terms of size 1, in another order.
    np.testing.assert_allclose(out, expected, atol=2.0**-23 * 40, rtol=0)
