# SPDX-License-Identifier: Apache-2.0
"""The Mosaic TPU kernel on a machine without a TPU: interpreted, and compiled ahead of time."""

import dataclasses
import functools
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvq_jax import aot, decode_attention
from kvq_jax.base import KV, CodedSegment, RingKV
from kvq_jax.codecs import Affine
from kvq_jax.kernels.decode_attention import mosaic_tpu, tpu
from kvq_jax.kernels.decode_attention.mosaic_tpu import launch
from tests.kernels.decode_attention_test import BATCH, Case, codecs, expect, fits, make

bf16 = functools.partial(Case, dtype=jnp.bfloat16, head_dim=128, group_size=128)

CASES = {
    "gqa": bf16(groups_per_block=2),
    "H64": bf16(head_dim=64, groups_per_block=4),
    "H64-group32": bf16(head_dim=64, group_size=32, groups_per_block=8, coded=(20, 7, 0)),
    "H256-group64": bf16(head_dim=256, group_size=64, groups_per_block=4, heads=(2, 1)),
    "mha": bf16(heads=(2, 2), groups_per_block=8, coded=(17, 2, 0)),
    "4-to-1": bf16(heads=(8, 2), groups_per_block=4, coded=(9, 5, 0)),
    "16-to-1": bf16(heads=(16, 1)),
    "K2V8": bf16(bits=(2, 8)),
    "K8V4": bf16(bits=(8, 4), heads=(1, 1), groups_per_block=8, coded=(9, 5, 0)),
    "K4V2-group32": bf16(bits=(4, 2), group_size=32, groups_per_block=8),
    "T5": bf16(num_tokens=5, heads=(3, 1)),
    "T8-H64": bf16(num_tokens=8, head_dim=64, heads=(2, 1)),
    "window": bf16(sliding_window=100, group_size=64, groups_per_block=4, heads=(2, 2)),
    "window-T2": bf16(sliding_window=33, num_tokens=2, heads=(2, 1)),
    "nothing-coded": bf16(coded=(0, 0, 0)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arranged(coded):
    """A segment in the tpu layout."""
    keys, values = tpu.from_codes(coded.keys, coded.values)
    return coded._replace(keys=keys, values=values)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def _attend(case, data, coded, capacity=None):
    key_codec, value_codec = codecs(case) if coded is not None else (None, None)
    return decode_attention(
        data.q,
        data.length,
        data.dense,
        coded,
        key_codec=key_codec,
        value_codec=value_codec,
        sliding_window=case.sliding_window,
        capacity=capacity,
        implementation="mosaic_tpu",
    )


def attend(case, data, coded, **keywords):
    # What the kernel did not write is NaN there, and reading beyond an array raises.
    with pltpu.force_tpu_interpret_mode():
        return _attend(case, data, coded, **keywords)


@every_case
def test_is_the_reference(case):
    data = make(case)
    out = attend(case, data, arranged(data.coded))
    assert out.dtype == case.dtype and out.shape == data.q.shape
    expected = expect(case, data, data.whole)
    assert fits(out, expected)
    # Teeth: what is nearly right fails the same check.
    kv = data.whole
    new = kv.positions == (data.length - case.num_tokens)[:, None, None]
    assert not fits(
        out, expect(case, data, kv._replace(positions=jnp.where(new, -1, kv.positions)))
    )
    assert not fits(out, expect(case, data, kv._replace(values=jnp.roll(kv.values, 1, 2))))


def test_what_no_tpu_of_v4_multiplies_is_converted(monkeypatch):
    monkeypatch.setattr(launch, "_takes_e5m2", lambda: False)
    case = bf16(groups_per_block=2, heads=(5, 1))
    data = make(case)
    assert fits(attend(case, data, arranged(data.coded)), expect(case, data, data.whole))


@pytest.mark.parametrize("bits", [2, 4])
def test_error_at_many_tokens(bits):
    case = bf16(
        bits=(bits, bits), heads=(4, 1), groups_per_block=16, coded=(48, 20, 0), dense=(40, 3, 40)
    )
    data = make(case)
    out = np.asarray(attend(case, data, arranged(data.coded)), np.float32)
    expected = np.asarray(expect(case, data, data.whole)[0])
    assert np.linalg.norm(out - expected) < 5e-3 * np.linalg.norm(expected)


def test_a_cache_without_codes():
    case = bf16(coded=(0, 0, 0))
    data = make(case)._replace(coded=None)
    assert fits(attend(case, data, None), expect(case, data, data.whole))
    data = make(dataclasses.replace(case, head_dim=64))
    with pytest.raises(NotImplementedError, match="heads of 64 channels without codes"):
        attend(case, data, None)


def test_dense_slots_of_several_blocks(monkeypatch):
    monkeypatch.setattr(launch, "DENSE_BLOCK", 128)
    batch, num_heads, slots, head_dim = 2, 2, 300, 128
    random = np.random.default_rng(0)
    shape = (2, batch, num_heads, slots, head_dim)
    k, v = jnp.asarray(random.standard_normal(shape, np.float32), jnp.bfloat16)
    length = jnp.array([290, 100], jnp.int32)
    q = k[:, :, :1].swapaxes(1, 2).repeat(3, 2)
    dense = RingKV(k, v, jnp.zeros((batch, num_heads, 0), jnp.int32), jnp.zeros(batch, jnp.int32))
    with pltpu.force_tpu_interpret_mode():
        out = decode_attention(q, length, dense, implementation="mosaic_tpu")
    expected = decode_attention(q, length, dense, implementation="reference")
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected)), atol=0.02)


def test_too_many_tokens_attend_to_nan():
    case = CASES["gqa"]
    data = make(case)
    capacity = int(np.sort(data.length)[1])
    out = np.asarray(attend(case, data, arranged(data.coded), capacity=capacity), np.float32)
    over = np.asarray(data.length) > capacity
    assert np.isnan(out[over]).all() and np.isfinite(out[~over]).all()


def test_what_is_beyond_float16_is_nan():
    case = CASES["gqa"]
    data = make(case)
    keys = data.coded.keys
    for bad in (jnp.inf, jnp.nan):
        scale = keys.scale.at[data.coded.block_table[0, 0], 0].set(bad)
        coded = data.coded._replace(keys=keys._replace(scale=scale))
        out = np.asarray(attend(case, data, arranged(coded)), np.float32)
        assert np.isnan(out[0, :, : case.heads[0] // case.heads[1]]).all()
        assert np.isfinite(out[1:]).all()


def test_subnormal_scales():
    case = bf16(groups_per_block=2, dense=(1, 1, 1), coded=(2, 2, 1))
    data = make(case)
    tiny = jax.tree.map(
        lambda x: x * jnp.float16(2**-16) if x.dtype == jnp.float16 else x, data.coded
    )
    out = attend(case, data, arranged(tiny))
    key_codec, value_codec = codecs(case)
    expected = decode_attention(
        data.q,
        data.length,
        data.dense,
        tiny,
        key_codec=key_codec,
        value_codec=value_codec,
        implementation="reference",
    )
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": jnp.float16}, "it computes in bfloat16, not float16"),
        ({"num_tokens": 9}, "it takes up to 8 tokens at a time, not 9"),
        ({"head_dim": 32}, "head_dim must be one of"),
        ({}, 'the codes are not in the "tpu" layout'),
    ],
)
def test_refuses_by_name(change, reason):
    case = dataclasses.replace(CASES["H64"], **change)
    data = make(case)
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu can't serve this call: {reason}"):
        _attend(case, data, data.coded)


# Batch 2, of a few heads, tokens enough for two blocks: bits, head_dim, query heads of a KV head,
# T, group_size, channels of a value scale. No bits are a cache without codes.
MATRIX = [
    ((2, 2), 128, 4, 1, 128, 128),
    ((4, 4), 128, 4, 1, 128, 128),
    ((8, 8), 128, 1, 1, 64, 64),
    ((2, 4), 128, 16, 1, 32, 128),
    ((4, 2), 128, 4, 8, 128, 32),
    ((2, 2), 64, 3, 1, 128, 64),
    ((4, 8), 64, 8, 2, 32, 32),
    ((2, 2), 256, 2, 1, 128, 128),
    ((8, 2), 256, 8, 4, 64, 256),
    (None, 128, 4, 1, 128, 128),
    (None, 256, 1, 8, 128, 128),
]
NUM_KV_HEADS, CAPACITY, DENSE_SLOTS = 2, 2048, 208


def every_launch(arrays):
    """Attention of all of `MATRIX`: one program, since starting the compiler takes the most."""
    outs = []
    for (bits, _, _, _, group_size, channels), (q, length, dense, coded) in zip(
        MATRIX, arrays, strict=True
    ):
        codecs = {}
        if bits:
            codecs["key_codec"] = Affine(bits[0], (group_size, 1))
            codecs["value_codec"] = Affine(bits[1], (1, channels))
        outs.append(
            decode_attention(q, length, dense, coded, **codecs, implementation="mosaic_tpu")
        )
    return outs


def shapes():
    shape = jax.ShapeDtypeStruct
    arrays = []
    for bits, head_dim, num_queries, num_tokens, group_size, channels in MATRIX:
        heads = BATCH, NUM_KV_HEADS
        kv = shape((*heads, DENSE_SLOTS if bits else CAPACITY, head_dim), jnp.bfloat16)
        pool = shape((*heads, 48 if bits else 0), jnp.int32)
        ints = shape((BATCH,), jnp.int32)
        coded = None
        if bits:
            per_block = CAPACITY // 2 // group_size
            group = shape((2 * BATCH, NUM_KV_HEADS, per_block, group_size, head_dim), jnp.bfloat16)
            key_codec, value_codec = (
                Affine(bits[0], (group_size, 1)),
                Affine(bits[1], (1, channels)),
            )
            codes = jax.eval_shape(
                lambda x, k=key_codec, v=value_codec: tpu.from_codes(k.encode(x), v.encode(x)),
                group,
            )
            coded = CodedSegment(*codes, shape((BATCH, 2), jnp.int32), ints)
        q = shape((BATCH, num_tokens, num_queries * NUM_KV_HEADS, head_dim), jnp.bfloat16)
        arrays.append((q, ints, RingKV(kv, kv, pool, ints), coded))
    return arrays


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="libtpu is for x86-64 Linux"
)
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_compiles_without_a_copy(chip):
    compiled = aot.compile_for(chip, every_launch, shapes())
    assert compiled.hlo.count('custom_call_target="tpu_custom_call"') == len(MATRIX)
    # Codes and dense slots are read where they lie.
    smallest = 2 * BATCH * NUM_KV_HEADS * CAPACITY // 2 * 64 * 2 // 8
    if chip != "v5p":  # whose two cores have scratch memory there
        assert compiled.temp_bytes < smallest


def test_dispatch_says_why(caplog):
    case = CASES["H64"]
    data = make(case)
    coded = arranged(data.coded)
    assert mosaic_tpu.reason_against(data.q, coded) is None
    key_codec, value_codec = codecs(case)
    with caplog.at_level("INFO"):
        out = decode_attention(
            data.q, data.length, data.dense, coded, key_codec=key_codec, value_codec=value_codec
        )
    assert "runs as xla: there is no Hopper GPU and no TPU" in caplog.text
    assert fits(out, expect(case, data, data.whole))
    assert isinstance(data.dense, KV)
