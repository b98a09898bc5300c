# SPDX-License-Identifier: Apache-2.0
"""What is true of every method: one matrix, a row a method (`cases.py`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import measure
from kvq_jax.kernels.decode_attention import plain
from kvq_jax.models import DecoderConfig
from tests.methods.cases import CASES, SHAPES
from tests.methods.contract import (
    CAPACITY,
    NUM_TOKENS,
    as_attended,
    assert_same,
    dense_attention,
    filled,
    functions,
    init,
    make,
    one_by_one,
    tokens,
    tolerance,
    worst_row,
)

matrix = pytest.mark.parametrize(
    "case, shape",
    [
        pytest.param(case, shape, id=f"{name}-{size}")
        for name, case in CASES.items()
        for size, shape in SHAPES.items()
        if size in case.shapes
    ],
)


@matrix
def test_attend_is_dense_attention_over_read(case, shape, getkey):
    lengths = jnp.array([NUM_TOKENS, 77][: shape.batch_size])
    method, state, (_, _, q) = filled(case, shape, getkey(), lengths)
    kv = jax.jit(method.read)(state)
    bound = tolerance(shape)
    # Other codecs and other shapes are attended to alike by one token and by several.
    for num_queries in (1, 3) if case.is_policy and shape == SHAPES["gqa"] else (3,):
        expected = dense_attention(q[:, :num_queries], kv, state.length)
        for implementation in ("xla", "reference"):
            attend = jax.jit(functools.partial(method.attend, implementation=implementation))
            out = attend(state, q[:, :num_queries])
            assert worst_row(out, expected) < bound, (num_queries, implementation)
    q = q[:, :num_queries]

    # Teeth: none of these wrong answers would have passed.
    wrong = {
        "keys and values swapped": kv._replace(keys=kv.values, values=kv.keys),
        "tokens of keys permuted": kv._replace(keys=jnp.roll(kv.keys, 1, axis=2)),
        "last token dropped": kv._replace(
            positions=jnp.where(kv.positions == kv.positions.max(-1, keepdims=True), -1,
                                kv.positions)
        ),
    }  # fmt: skip
    if shape.num_kv_heads > 1:
        wrong["heads permuted"] = jax.tree.map(
            lambda x: x[:, ::-1], kv._replace(positions=kv.positions)
        )
    for name, kv in wrong.items():
        assert worst_row(out, dense_attention(q, kv, state.length)) > bound, name


@matrix
def test_read_returns_every_token_once(case, shape, getkey):
    lengths = jnp.array([NUM_TOKENS, 77][: shape.batch_size])
    method, state, (k, v, _) = filled(case, shape, getkey(), lengths, bits=8, value_bits=8)
    kv = method.read(state)
    k = as_attended(method, k, shape)
    for row, head in np.ndindex(shape.batch_size, shape.num_kv_heads):
        positions = np.broadcast_to(kv.positions, kv.keys.shape[:3])[row, head]
        order = np.argsort(positions)[positions.min() < 0 and (positions < 0).sum() :]
        np.testing.assert_array_equal(positions[order], np.arange(lengths[row]))
        for stored, given in ((kv.keys, k), (kv.values, v)):
            stored = np.asarray(stored[row, head], np.float32)[order]
            given = np.asarray(given[row, : lengths[row], head], np.float32)
            bound = case.worst + 8 * float(jnp.finfo(shape.dtype).eps)  # rounding to the dtype
            assert np.abs(stored - given).max() < bound


@matrix
def test_state_depends_on_tokens_not_on_cuts(case, shape, getkey):
    method = make(case, shape, 2, 4)
    k, v, _ = tokens(shape, getkey())
    empty = init(method, shape.spec(CAPACITY))
    append, prefill, _ = functions(method)
    # What a prompt is fitted to stays as it is while tokens come by other calls.
    whole = (append if method.needs_prompt else prefill)(empty, k, v)
    assert_same(method, one_by_one(method, empty, k, v), whole)
    if shape == SHAPES["gqa"] and case.is_policy:
        cuts, state = [1, 71, 180], empty
        for start, stop in zip([0, *cuts], [*cuts, NUM_TOKENS], strict=True):
            state = append(state, k[:, start:stop], v[:, start:stop])
        assert_same(method, state, whole)


def codecs(case):
    """What of a method its bits go to."""
    method = case.make(2, 2)
    if not isinstance(method, kvq.Window):
        return method
    return method.key_codec, method.value_codec, method.key_frame, method.value_frame


one_of_each = {codecs(x): pytest.param(x, id=name) for name, x in reversed(CASES.items())}


@pytest.mark.parametrize("case", one_of_each.values())
def test_more_bits_are_never_worse(case, getkey):
    shape, key, errors = SHAPES["gqa"], getkey(), []
    for bits in (2, 4, 8):
        method, state, (k, v, q) = filled(case, shape, key, bits=bits, value_bits=bits)
        k = as_attended(method, k, shape)
        exact = kvq.KV(k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.arange(NUM_TOKENS)[None, None])
        exact = exact._replace(positions=jnp.broadcast_to(exact.positions, exact.keys.shape[:3]))
        out = functions(method)[2](state, q[:, -1:])
        errors.append(worst_row(out, dense_attention(q[:, -1:], exact, state.length)))
    if method == kvq.dense():
        assert max(errors) < tolerance(shape)
    else:
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.05 + tolerance(shape)


@matrix
@pytest.mark.parametrize("capacity", [20, 200, 3000])
def test_nbytes_is_the_formula_of_the_docstring(case, shape, capacity):
    for bits, value_bits in ((2, 2), (4, 2), (8, 4)):
        method = make(case, shape, bits, value_bits)
        spec = shape.spec(capacity)
        state = init(method, spec)
        assert method.capacity(state) >= capacity
        coded = blocks = 0
        if isinstance(method, kvq.Window):
            blocks = state.coded.block_table.shape[1]
            coded = blocks * plain.block_size(state.coded, method.group_size)
            if sizes := method.sizes():
                (bits,), (value_bits,) = sizes
        assert kvq.nbytes(state) == case.nbytes(spec, bits, value_bits, coded, blocks)
        assert kvq.nbytes(state) == sum(x.nbytes for x in jax.tree.leaves(state))
        assert kvq.nbytes(state) == sum(kvq.nbytes_by_part(state).values())


def test_memory_at_8k_tokens_is_a_sixth():
    """The paper's setting on heads of 128 channels (Llama 3, Mistral, Qwen)."""
    for capacity, ratio in ((2048, 4.2), (8192, 6.0), (32768, 6.8)):
        spec = kvq.CacheSpec(1, 8, capacity, 128, jnp.bfloat16)
        small, large = (
            kvq.nbytes(jax.eval_shape(functools.partial(method.init, spec)))
            for method in (kvq.ott(), kvq.dense())
        )
        assert large / small > ratio, (capacity, large / small)


def test_bits_per_element_of_the_paper():
    """2 bits, and 16-bit scale and minimum for each group of 128: 2.25 in the limit."""
    config = DecoderConfig(
        vocab_size=2, width=1024, num_layers=1, num_q_heads=8, num_kv_heads=8, head_dim=128,
        mlp_width=1, max_length=1, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    assert 2.25 < measure.bits_per_element(kvq.ott(), config, 1 << 20) < 2.26
