# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.layers import RMSNorm, apply_rope, matmul_precision, rope_frequencies

CONFIG = DecoderConfig(
    vocab_size=61,
    width=32,
    num_layers=1,
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=48,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=100.0,
)


def test_rope_frequencies_by_hand():
    np.testing.assert_allclose(rope_frequencies(CONFIG), [1.0, 0.1], rtol=1e-7)
    divided = dataclasses.replace(CONFIG, rope_divisors=(1.0, 4.0))
    np.testing.assert_allclose(rope_frequencies(divided), [1.0, 0.025], rtol=1e-7)


def test_rope_turns_channels_i_and_i_plus_half():
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    turned = apply_rope(x, jnp.array([[3]], jnp.int32), rope_frequencies(CONFIG))
    # (1, 0) turned by 3 radians, (0, 2) by 0.3.
    expected = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(turned.ravel(), expected, rtol=1e-6)


def test_rope_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 4))
    frequencies = rope_frequencies(CONFIG)

    def score(q_position, k_position):
        return jnp.vdot(
            apply_rope(q, jnp.array([[q_position]], jnp.int32), frequencies),
            apply_rope(k, jnp.array([[k_position]], jnp.int32), frequencies),
        )

    np.testing.assert_allclose(score(7, 2), score(25, 20), rtol=1e-5)
    assert abs(score(7, 2) - score(7, 3)) > 1e-3


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=1.0, dtype=jnp.dtype(jnp.float32))
    norm.scale.set_value(jnp.array([2.0, 0.5]))
    # The mean square of (3, 4) is 12.5.
    expected = np.array([6.0, 2.0]) / np.sqrt(13.5)
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), expected, rtol=1e-6)


def test_only_float32_asks_for_more_precision():
    assert matmul_precision(jnp.dtype(jnp.float32)) == "highest"
    assert matmul_precision(jnp.dtype(jnp.bfloat16)) is None
