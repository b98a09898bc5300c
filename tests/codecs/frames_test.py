# SPDX-License-Identifier: Apache-2.0
"""Frames: nothing is lost, products stay what they are, and what each evens out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.frames import AS_GIVEN, BlockLinear, Hadamard

B, T, K, H = 2, 40, 2, 96
FRAMES = {
    "as given": AS_GIVEN,
    "hadamard": Hadamard(),
    "signs": Hadamard(seed=3),
    "blocks": BlockLinear(16),
}
every = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)


def sample(key):
    """Channels of very different size that belong together in fours, and queries."""
    kx, kq, ks = jax.random.split(key, 3)
    x = jax.random.normal(kx, (B, T, K, H)) * jnp.exp(jax.random.normal(ks, (H,)))
    x = x + 3 * jnp.repeat(x[..., ::4], 4, -1)
    return Sample(x, jnp.ones((B, T), bool), jax.random.normal(kq, (B, T, 2 * K, H)))


def fitted(frame, x):
    return frame.bind(frame.fit(x)) if frame.fits else frame


@every
def test_entering_and_leaving_changes_nothing(frame, getkey):
    x = sample(getkey())
    frame = fitted(frame, x)
    np.testing.assert_allclose(frame.leave(frame.enter(x.x)), x.x, rtol=1e-4, atol=1e-4)


@every
def test_absorbed_queries_have_the_same_products(frame, getkey):
    x = sample(getkey())
    frame = fitted(frame, x)
    product = jnp.einsum("btnh,bth->btn", x.q, x.x[:, :, 0])
    stored = jnp.einsum("btnh,bth->btn", frame.absorb(x.q), frame.enter(x.x)[:, :, 0])
    np.testing.assert_allclose(stored, product, rtol=1e-3, atol=1e-3)
    if frame != AS_GIVEN:  # teeth
        wrong = jnp.einsum("btnh,bth->btn", x.q, frame.enter(x.x)[:, :, 0])
        assert np.abs(wrong - product).max() > 1


def test_hadamard_is_the_matrix(getkey):
    matrix = np.ones((1, 1))
    while len(matrix) < 32:  # the largest power of two in 96
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = np.kron(np.eye(3), matrix / 32**0.5)
    x = sample(getkey()).x
    np.testing.assert_allclose(Hadamard().enter(x), x @ matrix.astype(np.float32), atol=1e-4)
    signs = Hadamard(seed=3)._signs(H)
    assert set(np.asarray(signs)) == {1.0, -1.0}
    np.testing.assert_array_equal(Hadamard(seed=3).enter(x), Hadamard().enter(x * signs))


def test_blocks_move_half_of_the_spread_into_the_map(getkey):
    """The singular values of the prompt's blocks are square roots of what they were."""
    x = sample(getkey())
    frame = fitted(BlockLinear(16), x)
    for row in range(B):
        before, after = (
            np.linalg.svd(np.asarray(y[row]).reshape(-1, 16), compute_uv=False)
            for y in (x.x, frame.enter(x.x))
        )
        before, after = (y / y[0] for y in (before, after))
        np.testing.assert_allclose(after, np.sqrt(before), rtol=1e-3)


def test_padding_and_other_rows_do_not_count(getkey):
    x = sample(getkey())
    mask = x.mask.at[0, 25:].set(False)
    dirty = jnp.where(mask[..., None, None], x.x, jnp.nan)
    matrices = BlockLinear(16).fit(Sample(dirty, mask))
    alone = BlockLinear(16).fit(Sample(x.x[:1, :25], mask[:1, :25]))
    for a, b in zip(matrices, alone, strict=True):
        np.testing.assert_allclose(np.abs(a[0]), np.abs(b[0]), rtol=1e-3, atol=1e-3)


def test_a_prompt_of_zeros_or_of_one_token_is_no_trouble():
    for x in (jnp.zeros((1, 4, 1, 16)), jnp.ones((1, 1, 1, 16))):
        frame = fitted(BlockLinear(16), Sample(x, jnp.ones(x.shape[:2], bool)))
        np.testing.assert_allclose(frame.leave(frame.enter(x)), x, atol=1e-5)


def test_refuses_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="blocks of 36 channels do not divide head_dim=96"):
        kvq.decoquant(block_size=36).init(kvq.CacheSpec(1, 1, 64, H))
