# SPDX-License-Identifier: Apache-2.0
"""Decode attention of every implementation against the reference, by bounds with teeth."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from kvq_jax import decode_attention
from kvq_jax.base import KV, CodedSegment
from kvq_jax.codecs import Affine
from kvq_jax.kernels.decode_attention import api, plain, reference, xla

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
    rope: bool = False  # keys are kept from before rotary embedding


CASES = {
    "base": Case(),
    "K2V8": Case(bits=(2, 8)),
    "K8V4": Case(bits=(8, 4)),
    "group128-H32": Case(group_size=128, head_dim=32),
    "group64-H128": Case(group_size=64, head_dim=128),
    "H256-mha": Case(head_dim=256, heads=(2, 2)),
    "K4V2-mqa": Case(bits=(4, 2), heads=(5, 1)),
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
    "rope-T5": Case(rope=True, num_tokens=5),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Data(NamedTuple):
    q: jax.Array
    length: jax.Array
    dense: KV
    coded: CodedSegment | None
    whole: KV  # both segments, put together without layout, blocks or table
    rope: jax.Array | None


def codecs(case):
    return (
        Affine(case.bits[0], (case.group_size, 1)),
        Affine(case.bits[1], (1, case.group_size)),
    )


def frequencies(case):
    """Radians per token, other ones in each row."""
    half = case.head_dim // 2
    shared = 1000 ** -(np.arange(half) / half)
    return (np.array([[1], [0.5], [2]]) * shared).astype(np.float32)


def turned(kv, rope):
    """Keys after rotary embedding, by complex numbers."""
    angle = kv.positions[..., None].astype(np.float32) * rope[:, None, None]
    first, second = np.split(kv.keys.astype(np.float64), 2, -1)
    z = (first + 1j * second) * np.exp(1j * angle.astype(np.float64))
    return kv._replace(keys=np.concatenate([z.real, z.imag], -1).astype(kv.keys.dtype))


@functools.partial(jax.jit, static_argnums=0)
def code(case, k, v, held):
    """Codes of keys and values, and both decoded."""
    key_codec, value_codec = codecs(case)
    codes = key_codec.encode(k), value_codec.encode(v, held)
    return codes, key_codec.decode(codes[0], case.dtype), value_codec.decode(codes[1], case.dtype)


def make(case, seed=0):
    """Random tokens, one in ten a hole, in blocks that lie in random order.

    Made by numpy: compiling jax.random would take most of the time of these tests.
    """
    random = np.random.default_rng(seed)
    num_q_heads, num_kv_heads = case.heads
    num_coded = np.array(case.coded, np.int32) * case.group_size
    in_dense = np.array(case.dense, np.int32)

    def normal(*shape):
        return random.standard_normal(shape, np.float32).astype(case.dtype)

    shape = (BATCH, num_kv_heads, BLOCKS * case.groups_per_block, case.group_size)
    k, v = (normal(*shape, case.head_dim) for _ in "kv")
    held = random.random((BATCH, num_kv_heads, shape[2] * shape[3])) < 0.9
    position = np.arange(held.shape[-1], dtype=np.int32)
    held &= (position < num_coded[:, None])[:, None]
    codes, *decoded = code(case, k, v, held.reshape(shape))
    coded = KV(
        *(np.asarray(x).reshape(*held.shape, -1) for x in decoded), np.where(held, position, -1)
    )

    table = random.permutation(BATCH * BLOCKS).astype(np.int32)

    def store(leaf):
        leaf = np.asarray(leaf)
        leaf = leaf.reshape(BATCH, num_kv_heads, BLOCKS, case.groups_per_block, *leaf.shape[3:])
        leaf = np.moveaxis(leaf, 2, 1)
        stored = np.empty((BATCH * BLOCKS, *leaf.shape[2:]), leaf.dtype)
        stored[table] = leaf.reshape(stored.shape)
        return stored

    segment = CodedSegment(*jax.tree.map(store, codes), table.reshape(BATCH, BLOCKS), num_coded)

    slot = np.stack([random.permutation(SLOTS) for _ in range(BATCH)]).astype(np.int32)
    positions = np.where(slot < in_dense[:, None], num_coded[:, None] + slot, -1)[:, None]
    k, v = (normal(BATCH, num_kv_heads, SLOTS, case.head_dim) for _ in "kv")
    garbage = np.asarray(1e3, case.dtype)
    dense = KV(*(np.where(positions[..., None] < 0, garbage, x) for x in (k, v)), positions)
    # Large queries, so that single tokens matter.
    q = normal(BATCH, case.num_tokens, num_q_heads, case.head_dim) * np.asarray(4, case.dtype)
    positions = np.broadcast_to(positions, k.shape[:-1])
    parts = (coded, dense._replace(positions=positions))
    whole = jax.tree.map(lambda *x: np.concatenate(x, 2), *parts)
    rope = frequencies(case) if case.rope else None
    if case.rope:
        whole = turned(whole, rope)
    return jax.tree.map(jnp.asarray, Data(q, num_coded + in_dense, dense, segment, whole, rope))


@functools.partial(jax.jit, static_argnums=(0, 2))
def attend(case, data, implementation="xla"):
    coded = data.coded
    key_codec, value_codec = codecs(case) if coded is not None else (None, None)
    return decode_attention(
        data.q,
        data.length,
        data.dense,
        coded,
        key_codec=key_codec,
        value_codec=value_codec,
        sliding_window=case.sliding_window,
        rope=data.rope,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnums=0)
def expect(case, data, kv):
    """The reference's output over kv in float32, and how far from it one may be."""
    q, keys, values = (x.astype(jnp.float32) for x in (data.q, kv.keys, kv.values))
    sm_scale = case.head_dim**-0.5
    options = dict(sm_scale=sm_scale, sliding_window=case.sliding_window)
    out = reference.attention(q, KV(keys, values, kv.positions), data.length, **options)
    size = reference.attention(q, KV(keys, abs(values), kv.positions), data.length, **options)
    # The error of a score is a relative one of its weight and, by their sum, of all weights:
    # 2 * score_error * size, where `size` is the output without cancellation. Rounding errors
    # add up like a random walk, to `walk` times the unit roundoff for the H products of a score
    # (times 2, for the largest of many), to sqrt(S) for the sums over tokens.
    square = jnp.einsum(
        "btkgh,bksh->btkgs",
        jnp.square(q).reshape(*q.shape[:2], case.heads[1], -1, case.head_dim),
        jnp.where((kv.positions >= 0)[..., None], jnp.square(keys), 0),
    )
    walk = 2 * sm_scale * jnp.sqrt(square.max(-1)).reshape(*q.shape[:3], 1)
    ulp = 2.0**-24
    bound = 2 * ulp * walk * case.head_dim**0.5 + 8 * ulp * kv.keys.shape[2] ** 0.5
    if case.dtype != jnp.float32:
        # A decoded key may be rounded to it or kept more precise, as XLA likes; besides, the
        # weights, the values and the output are rounded.
        bound += float(jnp.finfo(case.dtype).eps) / 4 * (2 * walk + 3)
    return out, bound * size


def fits(out, expected):
    """Whether every element of every row is within its bound."""
    out, (expected, bound) = np.asarray(out, np.float32), expected
    return bool((np.abs(out - expected) <= bound).all())


@every_case
def test_is_the_reference(case):
    data = make(case)
    expected = expect(case, data, data.whole)
    for implementation in ("xla", "reference"):
        out = attend(case, data, implementation)
        assert out.dtype == case.dtype and out.shape == data.q.shape
        assert fits(out, expected), implementation

    # Teeth: what is nearly right fails the same check.
    out = attend(case, data)
    kv, slot = data.whole, jnp.arange(data.whole.keys.shape[2], dtype=jnp.int32)
    new = kv.positions == (data.length - case.num_tokens)[:, None, None]
    wrong = {
        "keys for values": kv._replace(keys=kv.values, values=kv.keys),
        "first new token dropped": kv._replace(positions=jnp.where(new, -1, kv.positions)),
        "values of the next slot": kv._replace(values=jnp.roll(kv.values, 1, 2)),
    }
    if case.rope:
        wrong["keys turned twice"] = turned(jax.tree.map(np.asarray, kv), frequencies(case))
    if case.heads[1] > 1:
        wrong["heads permuted"] = jax.tree.map(lambda x: jnp.roll(x, 1, 1), kv)
    if any(case.coded) and case.sliding_window is None:
        in_hole = slot < data.coded.num_coded[:, None, None]
        wrong["holes filled"] = kv._replace(positions=jnp.where(in_hole, slot, kv.positions))
    for name, kv in wrong.items():
        assert not fits(out, expect(case, data, kv)), name
    assert not fits(jnp.roll(out, 1, 2), expected), "query heads permuted"


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize("name", ["base", "all-coded", "rope-T5"])
def test_blocks_decoded_together(name, n, monkeypatch):
    """As on a GPU; of 3 blocks, two at a time means that one is read again."""
    case = CASES[name]
    data = make(case)
    tokens = BATCH * case.groups_per_block * case.group_size * case.num_tokens
    monkeypatch.setattr(xla, "_tokens_at_once", lambda: n * tokens)
    out = jax.jit(lambda data: attend.__wrapped__(case, data))(data)
    assert fits(out, expect(case, data, data.whole))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_an_empty_cache_gives_zero(num_tokens):
    case = Case(num_tokens=num_tokens)
    data = make(case)
    data = data._replace(
        length=jnp.zeros_like(data.length),
        dense=data.dense._replace(positions=jnp.full_like(data.dense.positions, -1)),
        coded=jax.tree.map(jnp.zeros_like, data.coded),
    )
    assert (attend(case, data) == 0).all()


def test_positions_may_differ_by_head():
    case = Case()
    data = make(case)
    heads = case.heads[1]
    drop = np.random.default_rng(1).random((BATCH, heads, SLOTS)) < 0.3
    positions = jnp.where(drop, -1, data.dense.positions)
    whole = data.whole.positions.at[:, :, -SLOTS:].set(positions)
    data = data._replace(dense=data.dense._replace(positions=positions))
    out = attend(case, data)
    assert fits(out, expect(case, data, data.whole._replace(positions=whole)))
    assert not fits(out, expect(case, data, data.whole))


@pytest.mark.parametrize("fill", [0.1, 1.0], ids=["sparse", "full"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_long_dense_segment(fill, num_tokens):
    """Longer than a block and no multiple of it: read by blocks, or whole if mostly full."""
    case = Case(num_tokens=num_tokens)
    num_q_heads, num_kv_heads = case.heads
    slots = 2 * plain.BLOCK_SIZE + 77
    length = jnp.asarray([int(slots * fill), 50, 5], jnp.int32)
    random = np.random.default_rng(0)
    shapes = [(BATCH, num_kv_heads, slots, 64)] * 2 + [(BATCH, num_tokens, num_q_heads, 64)]
    k, v, q = (jnp.asarray(random.standard_normal(x, np.float32)) for x in shapes)
    q = 4 * q
    slot = jnp.arange(slots, dtype=jnp.int32)
    kv = KV(k, v, jnp.where(slot < length[:, None], slot, -1)[:, None])
    whole = kv._replace(positions=jnp.broadcast_to(kv.positions, k.shape[:3]))
    data = Data(q, length, kv, None, whole, None)
    out = attend(case, data)
    assert fits(out, expect(case, data, whole))
    last = whole.positions == (length - 1)[:, None, None]
    dropped = whole._replace(positions=jnp.where(last, -1, whole.positions))
    assert not fits(out, expect(case, data, dropped))


def test_nan_is_not_silent():
    case = Case()
    data = make(case)
    slot = jnp.argmax(data.dense.positions[0, 0])
    for part in ("keys", "values"):
        spoilt = getattr(data.dense, part).at[0, 0, slot, 3].set(jnp.nan)
        out = attend(case, data._replace(dense=data.dense._replace(**{part: spoilt})))
        assert jnp.isnan(out[0, :, :3]).any(-1).all()  # the heads that see it, and no others
        assert jnp.isfinite(out[0, :, 3:]).all() and jnp.isfinite(out[1:]).all()


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_leave_keys_from_before_rope_to_xla(name, monkeypatch, caplog):
    case = Case(dtype=jnp.bfloat16, head_dim=128, group_size=128, heads=(2, 1), rope=True)
    data = make(case)
    plain_out = attend(case, data)
    kernel, layout, _ = api._KERNELS[name]
    keys, values = layout.from_codes(data.coded.keys, data.coded.values)
    data = data._replace(coded=data.coded._replace(keys=keys, values=values))
    assert kernel.reason_against(data.q, data.coded) is None, "rope is not the one reason"
    reason = "it reads keys as they are, not from before rotary embedding"
    with pytest.raises(NotImplementedError, match=f"{name} can't serve this call: {reason}"):
        attend(case, data, name)
    monkeypatch.setattr(layout, "available", lambda: True)
    with caplog.at_level("INFO"):
        out = attend(case, data, None)
    assert f"runs as xla: of {name}, {reason}" in caplog.text
    np.testing.assert_array_equal(out, plain_out)


def test_refuses_what_does_not_fit():
    case = Case()
    data = make(case)
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
