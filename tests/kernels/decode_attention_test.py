# SPDX-License-Identifier: Apache-2.0
"""Decode attention of every implementation against the reference, by bounds with teeth."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from kvq_jax import decode_attention
from kvq_jax.base import KV, CodedSegment
from kvq_jax.codecs import Affine
from kvq_jax.kernels.decode_attention import plain, reference

BATCH, SLOTS, BLOCKS = 3, 40, 3


@dataclasses.dataclass(frozen=True)
class Case:
    num_tokens: int = 1
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 64
    bits: tuple[int, int] = (2, 2)
    group_size: int = 32
    groups_per_block: int = 2
    coded: tuple[int, ...] = (5, 2, 0)  # groups of each row, of 6
    dense: tuple[int, ...] = (30, 5, 9)  # tokens of each row, of 40
    dtype: Any = jnp.float32
    sliding_window: int | None = None


CASES = {
    "base": Case(),
    "K4V2": Case(bits=(4, 2)),
    "K2V8": Case(bits=(2, 8)),
    "K8V4": Case(bits=(8, 4)),
    "group64": Case(group_size=64),
    "group128-H32": Case(group_size=128, head_dim=32),
    "H128": Case(head_dim=128),
    "H256-mha": Case(head_dim=256, heads=(2, 2)),
    "mqa": Case(heads=(5, 1)),
    "bf16": Case(dtype=jnp.bfloat16),
    "bf16-T5-K8V8": Case(dtype=jnp.bfloat16, num_tokens=5, bits=(8, 8)),
    "T5": Case(num_tokens=5),
    "T5-mqa": Case(num_tokens=5, heads=(3, 1), bits=(4, 4)),
    "window": Case(sliding_window=70),
    "window-T5": Case(sliding_window=33, num_tokens=5),
    "window-in-dense": Case(sliding_window=3),
    "nothing-coded": Case(coded=(0, 0, 0)),
    "all-coded": Case(coded=(6, 6, 6)),
    "one-group-blocks": Case(groups_per_block=1, coded=(3, 2, 1)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Data(NamedTuple):
    q: jax.Array
    length: jax.Array
    dense: KV
    coded: CodedSegment
    whole: KV  # both segments, put together without layout, blocks or table


def codecs(case):
    return (
        Affine(case.bits[0], (case.group_size, 1)),
        Affine(case.bits[1], (1, case.group_size)),
    )


def make(case, getkey):
    """Random tokens, one in ten a hole, in blocks that lie in random order."""
    num_q_heads, num_kv_heads = case.heads
    size = case.group_size * case.groups_per_block
    num_coded = jnp.asarray(case.coded, jnp.int32) * case.group_size
    in_dense = jnp.asarray(case.dense, jnp.int32)[:, None]
    length = num_coded + in_dense[:, 0]

    shape = (BATCH, num_kv_heads, BLOCKS * case.groups_per_block, case.group_size, case.head_dim)
    k, v = (jax.random.normal(getkey(), shape).astype(case.dtype) for _ in "kv")
    position = jnp.arange(BLOCKS * size, dtype=jnp.int32)
    held = jax.random.bernoulli(getkey(), 0.9, (BATCH, num_kv_heads, BLOCKS * size))
    held &= (position < num_coded[:, None])[:, None]
    key_codec, value_codec = codecs(case)
    codes = key_codec.encode(k), value_codec.encode(v, held.reshape(shape[:-1]))
    coded = KV(
        key_codec.decode(codes[0], case.dtype).reshape(*held.shape, -1),
        value_codec.decode(codes[1], case.dtype).reshape(*held.shape, -1),
        jnp.where(held, position, -1),
    )

    table = jax.random.permutation(getkey(), BATCH * BLOCKS).astype(jnp.int32)

    def store(leaf):
        leaf = leaf.reshape(BATCH, num_kv_heads, BLOCKS, case.groups_per_block, *leaf.shape[3:])
        leaf = jnp.moveaxis(leaf, 2, 1)
        leaf = leaf.reshape(BATCH * BLOCKS, *leaf.shape[2:])
        return jnp.zeros_like(leaf).at[table].set(leaf)

    segment = CodedSegment(*jax.tree.map(store, codes), table.reshape(BATCH, BLOCKS), num_coded)

    shape = (BATCH, num_kv_heads, SLOTS, case.head_dim)
    k, v = (jax.random.normal(getkey(), shape).astype(case.dtype) for _ in "kv")
    slot = jnp.tile(jax.random.permutation(getkey(), SLOTS).astype(jnp.int32), (BATCH, 1))
    positions = jnp.where(slot < in_dense, num_coded[:, None] + slot, -1)
    empty = (positions < 0)[:, None, :, None]
    dense = KV(
        *(jnp.where(empty, jnp.asarray(1e3, case.dtype), x) for x in (k, v)), positions[:, None]
    )
    # Large queries, so that single tokens matter.
    q = 4 * jax.random.normal(getkey(), (BATCH, case.num_tokens, num_q_heads, case.head_dim))
    positions = jnp.broadcast_to(dense.positions, shape[:-1])
    parts = (coded, dense._replace(positions=positions))
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, 2), *parts)
    return Data(q.astype(case.dtype), length, dense, segment, whole)


def attend(case, data, implementation):
    key_codec, value_codec = codecs(case)

    @jax.jit
    def run(q, length, dense, coded):
        return decode_attention(
            q,
            length,
            dense,
            coded,
            key_codec=key_codec,
            value_codec=value_codec,
            sliding_window=case.sliding_window,
            implementation=implementation,
        )

    return run(data.q, data.length, data.dense, data.coded)


def expect(case, data, kv):
    """The reference's output over kv in float32, and how far from it one may be."""
    q = data.q.astype(jnp.float32)
    sm_scale = case.head_dim**-0.5
    options = dict(sm_scale=sm_scale, sliding_window=case.sliding_window)
    kv = kv._replace(keys=kv.keys.astype(jnp.float32), values=kv.values.astype(jnp.float32))
    out = reference.attention(q, kv, data.length, **options)
    size = reference.attention(q, kv._replace(values=abs(kv.values)), data.length, **options)
    # Rounding errors add up like a random walk. Scores are sums of H terms, and an error of a
    # score is a relative one of its weight and, by their sum, of all weights. The output is a
    # sum of S terms; `size` is it without cancellation.
    keys = jnp.where((kv.positions >= 0)[..., None], abs(kv.keys), 0).max(2)  # [B, K, H]
    keys = jnp.repeat(keys, case.heads[0] // case.heads[1], 1)[:, None]
    score = sm_scale * (abs(q) * keys).sum(-1, keepdims=True)
    ulp = 2.0**-24
    bound = (2 * ulp * score * case.head_dim**0.5 + 8 * ulp * kv.keys.shape[2] ** 0.5) * size
    if case.dtype == jnp.bfloat16:  # the weights and the output are rounded to it
        bound += 2.0**-9 * (size + abs(out))
    return np.asarray(out), np.asarray(bound)


def fits(out, expected):
    """Whether every element of every row is within its bound."""
    out, (expected, bound) = np.asarray(out, np.float32), expected
    return bool((np.abs(out - expected) <= bound).all())


@every_case
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_is_the_reference(case, implementation, getkey):
    data = make(case, getkey)
    out = attend(case, data, implementation)
    assert out.dtype == case.dtype and out.shape == data.q.shape
    assert fits(out, expect(case, data, data.whole))


@every_case
def test_bounds_have_teeth(case, getkey):
    """What is nearly right fails the same check."""
    data = make(case, getkey)
    out = attend(case, data, "xla")
    kv = data.whole
    last = kv.positions == (data.length - 1)[:, None, None]
    wrong = {
        "keys for values": kv._replace(keys=kv.values, values=kv.keys),
        "last token dropped": kv._replace(positions=jnp.where(last, -1, kv.positions)),
        "values of the next slot": kv._replace(values=jnp.roll(kv.values, 1, 2)),
        "holes filled": kv._replace(positions=kv.positions.at[:, :, 0].set(0)),
    }
    if case.heads[1] > 1:
        wrong["heads permuted"] = jax.tree.map(lambda x: jnp.roll(x, 1, 1), kv)
    if case.sliding_window is not None or not data.coded.num_coded.any():
        del wrong["holes filled"]  # the window may hide it
    for name, kv in wrong.items():
        assert not fits(out, expect(case, data, kv)), name
    permuted = jnp.roll(out, 1, 2)
    assert not fits(permuted, expect(case, data, data.whole)), "query heads permuted"


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_an_empty_cache_gives_zero(num_tokens, getkey):
    case = Case(num_tokens=num_tokens)
    data = make(case, getkey)
    data = data._replace(
        length=jnp.zeros_like(data.length),
        dense=data.dense._replace(positions=jnp.full_like(data.dense.positions, -1)),
        coded=jax.tree.map(jnp.zeros_like, data.coded),
    )
    assert (attend(case, data, "xla") == 0).all()


def test_positions_may_differ_by_head(getkey):
    case = Case()
    data = make(case, getkey)
    heads = case.heads[1]
    drop = jax.random.bernoulli(getkey(), 0.3, (BATCH, heads, SLOTS))
    positions = jnp.where(drop, -1, data.dense.positions)
    whole = data.whole.positions.at[:, :, -SLOTS:].set(positions)
    data = data._replace(dense=data.dense._replace(positions=positions))
    out = attend(case, data, "xla")
    assert fits(out, expect(case, data, data.whole._replace(positions=whole)))
    assert not fits(out, expect(case, data, data.whole))


@pytest.mark.parametrize("fill", [0.1, 1.0], ids=["sparse", "full"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_long_dense_segment(fill, num_tokens, getkey):
    """Longer than a block and no multiple of it: read by blocks, or whole if mostly full."""
    case = Case(num_tokens=num_tokens)
    num_q_heads, num_kv_heads = case.heads
    slots = 2 * plain.BLOCK_SIZE + 77
    length = jnp.asarray([int(slots * fill), 50, 5], jnp.int32)
    k, v = (jax.random.normal(getkey(), (BATCH, num_kv_heads, slots, 64)) for _ in "kv")
    q = 4 * jax.random.normal(getkey(), (BATCH, num_tokens, num_q_heads, 64))
    slot = jnp.arange(slots, dtype=jnp.int32)
    kv = KV(k, v, jnp.where(slot < length[:, None], slot, -1)[:, None])
    out = jax.jit(decode_attention)(q, length, kv)
    whole = kv._replace(positions=jnp.broadcast_to(kv.positions, k.shape[:3]))
    data = Data(q, length, kv, None, whole)
    assert fits(out, expect(case, data, whole))
    last = whole.positions == (length - 1)[:, None, None]
    dropped = whole._replace(positions=jnp.where(last, -1, whole.positions))
    assert not fits(out, expect(case, data, dropped))


def test_nan_is_not_silent(getkey):
    case = Case()
    data = make(case, getkey)
    slot = jnp.argmax(data.dense.positions[0, 0])
    for part in ("keys", "values"):
        spoilt = getattr(data.dense, part).at[0, 0, slot, 3].set(jnp.nan)
        out = attend(case, data._replace(dense=data.dense._replace(**{part: spoilt})), "xla")
        assert jnp.isnan(out[0, :, :3]).any(-1).all()  # the heads that see it, and no others
        assert jnp.isfinite(out[0, :, 3:]).all() and jnp.isfinite(out[1:]).all()


def test_refuses_what_does_not_fit(getkey):
    case = Case()
    data = make(case, getkey)
    key_codec, value_codec = codecs(case)
    good = dict(q=data.q, length=data.length, dense=data.dense)
    for message, changes in {
        "multiple of K=2 heads": dict(q=data.q[:, :, :5]),
        "cast one of them": dict(q=data.q.astype(jnp.bfloat16)),
        "needs key_codec and value_codec": dict(coded=data.coded),
        "sliding_window must be at least 1": dict(sliding_window=0),
        "does not fit": dict(dense=data.dense._replace(positions=data.whole.positions)),
    }.items():
        with pytest.raises(ValueError, match=message):
            decode_attention(**{**good, **changes})
    with pytest.raises((ValueError, TypeCheckError)):
        decode_attention(**good, implementation="fastest")
