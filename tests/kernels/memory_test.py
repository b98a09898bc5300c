# SPDX-License-Identifier: Apache-2.0
"""What the compiled decode step allocates: no dense copy of the cache, and none of its state."""

import re

import jax
import jax.numpy as jnp
import pytest

import kvq_jax as kvq

K, N, H = 3, 9, 64
CAPACITY = 32768
DENSE_BYTES = 2 * K * CAPACITY * H * 4
METHODS = {"dense": kvq.dense(), "kivi": kvq.kivi(), "ott": kvq.ott(group_size=32)}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def states(method, num_layers, capacity=CAPACITY):
    spec = kvq.CacheSpec(1, K, capacity, H, jnp.float32)
    return jax.eval_shape(lambda: tuple(method.init(spec) for _ in range(num_layers)))


def tokens(num_heads, num_tokens=1):
    return jax.ShapeDtypeStruct((1, num_tokens, num_heads, H), jnp.float32)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("method", [METHODS["kivi"], METHODS["ott"]], ids=["kivi", "ott"])
def test_attention_never_holds_the_cache_dense(method, num_tokens):
    attend = jax.jit(method.attend)
    memory = attend.lower(*states(method, 1), tokens(N, num_tokens)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * DENSE_BYTES


def test_the_analysis_sees_a_dense_copy():
    """Teeth: the reference decodes all, and the analysis must say so."""
    method = METHODS["kivi"]
    attend = jax.jit(lambda state, q: method.attend(state, q, implementation="reference"))
    memory = attend.lower(*states(method, 1), tokens(N)).compile().memory_analysis()
    assert memory.temp_size_in_bytes > 0.5 * DENSE_BYTES


@methods
def test_a_donated_step_is_in_place(method):
    """Over layers that are unrolled, as in `models`; each attends to what it has appended."""

    def step(states, q, k, v):
        new = []
        for state in states:
            state = method.append(state, k, v)
            q = q + method.attend(state, q)
            new.append(state)
        return tuple(new), q

    def measure(capacity):
        cache = states(method, 4, capacity)
        compiled = jax.jit(step, donate_argnums=0).lower(cache, tokens(N), tokens(K), tokens(K))
        memory = compiled.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= kvq.nbytes(cache)
        return memory.temp_size_in_bytes, kvq.nbytes(cache)

    # A block being decoded, and scores, take what they take; a copy of anything would grow with
    # the cache, by a tenth of it for the words of one layer's keys.
    (temp, state), (more_temp, more_state) = measure(CAPACITY), measure(2 * CAPACITY)
    assert temp < 0.2 * state
    assert more_temp - temp < 0.03 * (more_state - state)


@methods
def test_a_small_cache_is_not_copied_either(method):
    """Without a loop between them, XLA likes to fuse the write of a token with its reader."""

    def step(state, q, k, v):
        state = method.append(state, k, v)
        return state, method.attend(state, q)

    spec = kvq.CacheSpec(1, K, 512, H, jnp.float32)
    cache = jax.eval_shape(lambda: method.init(spec))
    compiled = jax.jit(step, donate_argnums=0).lower(cache, tokens(N), tokens(K), tokens(K))
    slots = cache.keys.shape
    copies = re.findall(
        rf"f32\[{','.join(map(str, slots))}\]\S* copy\(", compiled.compile().as_text()
    )
    assert not copies
