# SPDX-License-Identifier: Apache-2.0
"""Calls of every method: rows, layers, capacity, and what is refused; see `contract_test.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from tests.methods.cases import CASES, SHAPES
from tests.methods.contract import (
    CAPACITY,
    NUM_TOKENS,
    assert_same,
    filled,
    functions,
    init,
    make,
    tokens,
)

methods = pytest.mark.parametrize(
    "case", [pytest.param(x, id=name) for name, x in CASES.items() if not x.codec_only]
)
policies = pytest.mark.parametrize(
    "case", [pytest.param(x, id=name) for name, x in CASES.items() if x.is_policy]
)


@methods
def test_padding_is_ignored_and_rows_are_independent(case, getkey):
    shape = SHAPES["gqa"]
    method = make(case, shape)
    k, v, q = tokens(shape, getkey())
    lengths = jnp.array([150, 0])
    beyond = (jnp.arange(NUM_TOKENS) >= lengths[:, None])[..., None, None]
    prefill, attend = functions(method)[1:]
    empty = init(method, shape.spec(CAPACITY))
    clean = prefill(empty, k, v, lengths=lengths)
    poisoned = [jnp.where(beyond, jnp.nan, x) for x in (k, v)]
    assert_same(method, prefill(empty, *poisoned, lengths=lengths), clean)

    alone = prefill(init(method, shape._replace(batch_size=1).spec(CAPACITY)), k[:1], v[:1])
    neighbour = [x.at[1].set(jnp.nan) for x in (k, v)]
    both = prefill(empty, *neighbour)
    assert_same(method, kvq.select_rows(both, jnp.array([0])), alone)
    out = attend(both, q[:, :1])
    np.testing.assert_allclose(out[:1], method.attend(alone, q[:1, :1]), rtol=1e-6, atol=1e-6)
    assert np.isnan(out[1]).all(), "a NaN must not vanish"


@methods
def test_step_compiles_once_and_rows_of_any_length_share_it(case, getkey):
    shape = SHAPES["gqa"]
    method = make(case, shape)
    k, v, q = tokens(shape, getkey())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, k, v, q):
        state = method.append(state, k, v)
        return state, method.attend(state, q)

    state = init(method, shape.spec(CAPACITY))
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for i in range(100):  # past the first groups
        state, _ = step(state, *(x[:, i : i + 1] for x in (k, v, q)))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure


@policies
def test_exact_calls_attend_as_single_tokens_do(case, getkey):
    shape = SHAPES["mha"]
    method = make(case, shape)
    k, v, q = tokens(shape, getkey())
    append, _, attend = functions(method)

    def outputs(calls):
        state, start, parts = init(method, shape.spec(CAPACITY)), 0, []
        for size in calls:
            part = slice(start, start + size)
            state = append(state, k[:, part], v[:, part])
            parts.append(attend(state, q[:, part]))
            start += size
        assert start == NUM_TOKENS
        return jnp.concatenate(parts, axis=1)

    single = outputs([1] * NUM_TOKENS)
    np.testing.assert_allclose(
        outputs(method.exact_calls(NUM_TOKENS)), single, rtol=1e-4, atol=1e-5
    )


@methods
def test_vmaps_over_layers(case, getkey):
    shape = SHAPES["gqa"]
    method = make(case, shape)
    layers = [tuple(tokens(shape, getkey())) for _ in range(2)]
    k, v, q = (jnp.stack(x) for x in zip(*layers, strict=True))
    states = jax.tree.map(
        lambda *x: jnp.stack(x), *(init(method, shape.spec(CAPACITY)) for _ in layers)
    )
    states = jax.jit(jax.vmap(method.append))(states, k, v)
    out = jax.jit(jax.vmap(method.attend))(states, q[:, :, :1])
    for layer, (k, v, q) in enumerate(layers):
        alone = functions(method)[0](init(method, shape.spec(CAPACITY)), k, v)
        np.testing.assert_array_equal(jax.tree.leaves(states)[0][layer], jax.tree.leaves(alone)[0])
        np.testing.assert_allclose(
            out[layer], functions(method)[2](alone, q[:, :1]), rtol=1e-5, atol=1e-6
        )


@policies
def test_capacity_is_kept_and_going_beyond_is_loud(case, getkey):
    shape = SHAPES["gqa"]
    method = make(case, shape)
    k, v, q = tokens(shape, getkey())
    state = init(method, shape.spec(150))
    capacity = method.capacity(state)
    assert 150 <= capacity <= NUM_TOKENS
    lengths = jnp.array([capacity, capacity - 1])
    state = method.prefill(state, k, v, lengths=lengths)
    assert np.isfinite(method.attend(state, q[:, :1])).all()

    one = k[:, :1], v[:, :1]
    with pytest.raises(ValueError, match=rf"row 0 would hold {capacity + 1} tokens"):
        method.append(state, *one)
    append, _, attend = functions(method)
    out = attend(append(state, *one), q[:, :1])
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@methods
def test_bad_input_is_refused(case, getkey, as_users_run_it):
    shape = SHAPES["gqa"]
    method = make(case, shape)
    k, v, q = tokens(shape, getkey())
    state = init(method, shape.spec(CAPACITY))
    for bad_k, bad_v, message in (
        (k[0], v, r"k must be \[B=2, T>=1, K=2, H=64\]"),
        (k, v[..., :32], r"v must be \[B=2, T>=1, K=2, H=64\].*32\)"),
        (k[:, :, :1], v, r"k must be .*K=2"),
        (k[:1], v, r"k must be .*B=2"),
        (k[:, :0], v[:, :0], r"k must be .*T>=1"),
        (k, v[:, :3], r"one shape"),
        (k.astype(jnp.bfloat16), v, r"holds float32, got k of bfloat16"),
        (k.at[1, 7, 0, 3].set(jnp.nan), v, r"k is not finite at row 1, token 7"),
        (k, v.at[0, 9, 1, 0].set(jnp.inf), r"v is not finite at row 0, token 9"),
    ):
        with pytest.raises(ValueError, match=message):
            method.append(state, bad_k, bad_v)
        with pytest.raises(ValueError, match=message):
            method.prefill(state, bad_k, bad_v)
    for lengths, message in (
        (jnp.array([1, 2, 3]), r"lengths must be integers \[B=2\]"),
        (jnp.array([1.0, 2.0]), "lengths must be integers"),
        (jnp.array([1, NUM_TOKENS + 1]), r"lengths must be 0 to T=210"),
        (jnp.array([-1, 2]), "lengths must be 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            method.prefill(state, k, v, lengths=lengths)
    state = method.append(state, k[:, :1], v[:, :1])
    for bad_q, message in (
        (q[0], "q must be"),
        (q[:, :1, :3], "multiple of K=2"),
        (q[:, :1, :, :32], "H=64"),
        (q[:, :1].astype(jnp.bfloat16), "q is bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            method.attend(state, bad_q)
    with pytest.raises(ValueError, match="implementation must be one of"):
        method.attend(state, q[:, :1], implementation="cuda")
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        method.attend(state, q[:, :1], sliding_window=0)


@methods
def test_rows_are_selected_and_inserted(case, getkey, as_users_run_it):
    shape = SHAPES["gqa"]
    method, state, (k, v, q) = filled(case, shape, getkey(), jnp.array([NUM_TOKENS, 77]))
    append, prefill, attend = functions(method)
    rows = jnp.array([1, 0])
    swapped = jax.jit(kvq.select_rows)(state, rows)
    np.testing.assert_allclose(
        attend(swapped, q[rows, :1]), attend(state, q[:, :1])[rows], rtol=1e-5, atol=1e-6
    )
    # Copies of one row don't share storage: they go different ways.
    beams = kvq.select_rows(state, jnp.array([1, 1]))
    beams = append(beams, k[:, 77:140], v[:, 77:140])
    twice_k, twice_v, twice_q = (jnp.stack([x[1]] * 2) for x in (k, v, q))
    empty, lengths = init(method, shape.spec(CAPACITY)), jnp.array([77, 77])
    expected = prefill(empty, twice_k, twice_v, q=twice_q, lengths=lengths)
    expected = append(expected, k[:, 77:140], v[:, 77:140])
    assert_same(method, beams, expected)

    one = shape._replace(batch_size=1)
    new = prefill(init(method, one.spec(CAPACITY)), k[1:, :99], v[1:, :99])
    mixed = jax.jit(kvq.insert_row)(state, jnp.array(0), new)
    for row, expected in ((0, new), (1, kvq.select_rows(state, jnp.array([1])))):
        assert_same(method, kvq.select_rows(mixed, jnp.array([row])), expected)
    with pytest.raises(ValueError, match="rows must be 0 to 1"):
        kvq.select_rows(state, jnp.array([2]))
    with pytest.raises(ValueError, match="rows must be one axis of integers"):
        kvq.select_rows(state, jnp.array([0.0]))
    with pytest.raises(ValueError, match="rows must be 0 to 1"):
        kvq.insert_row(state, 2, new)
    with pytest.raises(ValueError, match="batch_size=1 and the same capacity"):
        kvq.insert_row(state, 0, init(method, one.spec(CAPACITY + 512)))
