# SPDX-License-Identifier: Apache-2.0
"""Tracing against a slow account of it, token by token in numpy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.kernels.decode_attention import plain

GROUP, RESIDUAL, NUM_TOKENS = 32, 16, 370


class Account:
    """OTT for one row and head with plain lists: what is where after some tokens."""

    def __init__(self, keys, num_outliers, num_auxiliary, order=1):
        self.pool, self.auxiliary, self.coded, self.tracing = [], [], {}, True
        score = np.linalg.norm(keys.astype(np.float64), ord=order, axis=-1)
        num_coded = 0
        while len(keys) - num_coded > GROUP + RESIDUAL:
            group = list(range(num_coded, num_coded + GROUP))
            num_coded += GROUP
            # Sorting is stable and the pool comes first, so it wins ties.
            best = sorted(self.pool + group, key=lambda t: score[t])[:num_outliers]
            losers = [t for t in self.pool if t not in best]
            if self.tracing and len(self.auxiliary) + len(losers) > num_auxiliary:
                self.tracing = False
            winners = [t for t in group if t in best] if self.tracing else []
            if self.tracing:
                self.pool, self.auxiliary = best, self.auxiliary + losers
            rest = [t for t in group if t not in winners]
            for t in group:
                self.coded[t] = keys[rest].mean(0) if t in winners else keys[t]
            self.holes = getattr(self, "holes", set()) | set(winners)


def keys_values(seed=0, num_tokens=NUM_TOKENS):
    """Keys whose norms fall now and then, so that tokens are pushed out of the pool."""
    rng = np.random.default_rng(seed)
    shape = (2, num_tokens, 2, 64)
    size = np.exp(rng.normal(size=shape[:3]) * 0.4)[..., None]
    return [
        jnp.asarray(x, jnp.float32) for x in (rng.normal(size=shape) * size, rng.normal(size=shape))
    ]


def filled(method, k, v):
    """A state of all tokens."""
    spec = kvq.CacheSpec(2, 2, 512, 64, jnp.float32)
    return method.append(method.init(spec), k, v)


@pytest.mark.parametrize(
    "num_outliers, num_auxiliary, score",
    [(1, 32, "l1"), (6, 32, "l2"), (4, 3, "l1"), (3, 0, "l1")],
)
def test_pools_holes_and_means_are_those_of_the_account(num_outliers, num_auxiliary, score):
    k, v = keys_values()
    method = kvq.ott(
        bits=8, group_size=GROUP, residual_length=RESIDUAL, num_outliers=num_outliers,
        num_auxiliary=num_auxiliary, score=score,
    )  # fmt: skip
    state = filled(method, k, v)
    read = plain.read(state.coded, method.key_codec, method.value_codec, jnp.float32)
    evicted = stopped = 0
    for row, head in np.ndindex(2, 2):
        keys = np.asarray(k[row, :, head])
        account = Account(keys, num_outliers, num_auxiliary, order=int(score[1]))
        positions = np.asarray(state.pool.positions[row, head])
        assert sorted(positions[:num_outliers]) == sorted(account.pool)
        n = int(state.pool.num_auxiliary[row, head])
        auxiliary = positions[num_outliers:]
        assert sorted(auxiliary[:n]) == sorted(account.auxiliary)
        assert (auxiliary[n:] == -1).all()
        assert bool(state.pool.tracing[row, head]) == account.tracing
        for slot, position in enumerate(positions):
            if position >= 0:  # the tokens themselves, exactly
                np.testing.assert_array_equal(state.keys[row, head, slot], keys[position])
                np.testing.assert_array_equal(state.values[row, head, slot], v[row, position, head])
        in_codes = np.asarray(read.positions[row, head])
        expected = set(account.coded) - account.holes
        assert set(in_codes[in_codes >= 0].tolist()) == expected
        decoded = np.asarray(read.keys[row, head])
        for token, key in account.coded.items():
            np.testing.assert_allclose(decoded[token], key, atol=8 / 255)
        evicted += len(account.auxiliary)
        stopped += not account.tracing
    # The data does exercise what it is meant to.
    assert evicted > 0 or num_auxiliary == 0
    assert stopped > 0 or num_auxiliary == 32


def test_heads_share_their_outliers():
    k, v = keys_values(1)
    method = kvq.ott(group_size=GROUP, residual_length=RESIDUAL, share_heads=True)
    state = filled(method, k, v)
    positions = np.asarray(state.pool.positions)
    np.testing.assert_array_equal(positions[:, 0], positions[:, 1])
    score = np.abs(np.asarray(k)).sum((2, 3))[:, : int(state.coded.num_coded[0])]
    for row in range(2):
        assert set(positions[row, 0, :3]) == set(np.argsort(score[row])[:3])


def test_sink_keeps_the_first_tokens():
    k, v = keys_values(2)
    state = filled(kvq.sink(group_size=GROUP, num_sinks=5), k, v)
    assert np.sort(state.pool.positions).tolist() == [[[0, 1, 2, 3, 4]] * 2] * 2
    assert state.pool.tracing.all()


def test_first_layers_are_coded_untraced_in_the_same_shape():
    k, v = keys_values(3)
    method = kvq.ott(group_size=GROUP, residual_length=RESIDUAL, untraced_layers=2)
    spec = kvq.CacheSpec(2, 2, 512, 64, jnp.float32)
    states = [method.append(method.init(spec, layer), k, v) for layer in (0, 1, 2, None)]
    assert [bool((s.pool.positions >= 0).any()) for s in states] == [False, False, True, True]
    plain_state = filled(kvq.kivi(group_size=GROUP, residual_length=RESIDUAL), k, v)
    for x, y in zip(*(leaves(s.coded) for s in (states[0], plain_state)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_outliers_is_kivi():
    assert kvq.ott(num_outliers=0) == kvq.kivi(residual_length=32)
    assert kvq.sink(num_sinks=0) == kvq.kivi(residual_length=32)


def test_a_tracer_takes_the_place_of_first_tokens():
    tracer = kvq.OutlierTracer(2)
    for make in (kvq.cq, kvq.kvquant, kvq.svdq):
        assert make().tracer == make(num_sinks=1).tracer == kvq.sink(num_sinks=1).tracer
        assert make(num_sinks=0).tracer is None
        assert make(tracer=tracer).tracer == tracer


def test_tracing_helps_where_small_keys_spoil_the_range():
    """Channels offset by 8, a few tokens near zero: the paper's picture."""
    rng = np.random.default_rng(4)
    k = rng.normal(size=(1, 400, 1, 64)) + 8
    k[:, ::60] *= 0.02
    k, v = jnp.asarray(k, jnp.float32), jnp.asarray(rng.normal(size=k.shape), jnp.float32)
    errors = {}
    for name, make in (("kivi", kvq.kivi), ("ott", functools.partial(kvq.ott, num_outliers=6))):
        method = make(group_size=GROUP, residual_length=RESIDUAL)
        state = method.append(method.init(kvq.CacheSpec(1, 1, 512, 64, jnp.float32)), k, v)
        kv = method.read(state)
        slot = np.argsort(np.where(kv.positions < 0, 10**6, kv.positions)[0, 0])[:400]
        errors[name] = np.abs(np.asarray(kv.keys[0, 0])[slot] - np.asarray(k[0, :, 0])).mean()
    assert errors["ott"] < 0.8 * errors["kivi"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_outliers": -1}, "num_outliers must be at least 1"),
        ({"num_auxiliary": -1}, "num_auxiliary must be at least 0"),
        ({"score": "l3"}, "score"),
    ],
)
def test_bad_settings_are_refused(options, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        kvq.ott(**options)


def leaves(tree):
    return [tree.keys.words, tree.keys.scale, tree.values.words, tree.values.minimum]
