# SPDX-License-Identifier: Apache-2.0
"""A window's groups: however many are coded together, and whenever their room is made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.codecs.frames import Hadamard
from kvq_jax.engines import window

GROUP, B, K, H, LAYERS = 32, 2, 2, 64, 3
METHODS = {
    "kivi": kvq.kivi(group_size=GROUP, residual_length=16),
    "ott": kvq.ott(group_size=GROUP, residual_length=16, untraced_layers=1),
    "ott-tight": kvq.ott(group_size=GROUP, residual_length=40, num_outliers=4, num_auxiliary=3),
    "no-residual": kvq.ott(group_size=GROUP, residual_length=0),
    "many-sinks": kvq.sink(group_size=GROUP, residual_length=16, num_sinks=GROUP + 5),
    "fitted-in-a-frame": dataclasses.replace(
        kvq.squat(group_size=GROUP, residual_length=16, tracer=kvq.OutlierTracer(score="l2")),
        key_frame=Hadamard(),
    ),
    "dense": kvq.dense(),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def tokens(num_tokens, seed=0):
    """Keys of uneven size, some of them twice so that scores tie, and values."""
    rng = np.random.default_rng(seed)
    shape = (B, num_tokens, K, H)
    k = rng.normal(size=shape) * np.exp(rng.normal(size=shape[:3]) * 0.4)[..., None]
    k[:, num_tokens // 2 :][:, :20] = k[:, :20]
    return [jnp.asarray(x, jnp.float32) for x in (k, rng.normal(size=shape))]


def empty(method, capacity=1024):
    spec = kvq.CacheSpec(B, K, capacity, H, jnp.float32)
    return tuple(method.init(spec, layer) for layer in range(LAYERS))


def assert_same(method, x, y):
    """Two states hold the same to the last bit; what unused dense slots hold aside."""

    def used(state):
        kv = method.read(state)
        keys, values = (jnp.where(kv.mask[..., None], a, 0) for a in (kv.keys, kv.values))
        return kv.positions, keys, values, state._replace(keys=(), values=())

    jax.tree.map(np.testing.assert_array_equal, used(x), used(y))


def step(method, states, k, v, *, ahead):
    """A model's step: every layer gets other keys."""
    cache = method
    if ahead:
        states, cache = method.make_room(states, k.shape[1])
    return tuple(cache.append(state, k * (i + 1), v) for i, state in enumerate(states))


@pytest.mark.parametrize(
    "name, num_tokens",
    [
        ("many-sinks", 1),
        ("ott-tight", 5),
        ("fitted-in-a-frame", 5),
    ],
)
def test_room_made_ahead_changes_nothing(name, num_tokens, monkeypatch):
    method = METHODS[name]
    # Two layers at a time, so that one is left over.
    monkeypatch.setattr(window, "_TOKENS_AT_ONCE", 2 * B * GROUP)
    k, v = tokens(300)
    start = [
        method.prefill(s, k, v, q=k * (i + 1), lengths=jnp.array([140, 93]))
        for i, s in enumerate(empty(method))
    ]
    steps = {
        ahead: jax.jit(functools.partial(step, method, ahead=ahead), donate_argnums=0)
        for ahead in (False, True)
    }
    states = {ahead: jax.tree.map(jnp.copy, tuple(start)) for ahead in steps}
    for i in range(0, 75, num_tokens):
        part = slice(i, i + num_tokens)
        for ahead, run in steps.items():
            states[ahead] = run(states[ahead], k[:, part], v[:, part])
    for x, y in zip(*states.values(), strict=True):
        assert_same(method, x, y)
    if isinstance(method, kvq.Window):
        done = [int(x.coded.num_coded.min() - s.coded.num_coded.min())
                for x, s in zip(states[True], start, strict=True)]  # fmt: skip
        assert min(done) >= 2 * GROUP, "no group was coded, nothing was tested"


@methods
def test_a_step_has_one_loop_for_all_layers_and_none_with_room(method):
    k, v = tokens(1)

    def loops(method, ahead):
        run = functools.partial(step, method, ahead=ahead)
        return str(jax.make_jaxpr(run)(empty(method), k, v)).count(" while[")

    coded = isinstance(method, kvq.Window)
    assert loops(method, ahead=False) == LAYERS * coded
    assert loops(method, ahead=True) == 1 * coded
    assert loops(method.with_room(1), ahead=True) == 0


def test_room_is_made_ahead_only_where_that_is_possible():
    method = METHODS["kivi"]
    states = empty(method)

    def rooms(states):
        return [method.make_room(states, n)[1].room for n in (1, 17, 18)]

    seen = []
    jax.eval_shape(lambda states: seen.extend(rooms(states)), states)
    assert seen == [1, 17, 0]  # from residual_length + 2 on, a group may hold new tokens
    assert rooms(states) == [0, 0, 0]  # outside jit, where it would compile anew in every step


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_host_that_counts_knows_when_a_group_is_coded(num_tokens):
    method = METHODS["ott"]
    append = jax.jit(method.append)
    k, v = (x[:, :num_tokens] for x in tokens(40))
    state = method.prefill(
        empty(method)[0], *tokens(40), lengths=jnp.arange(1, 1 + 13 * B, 13, dtype=jnp.int32)
    )
    lacking = []
    for _ in range(3 * GROUP // num_tokens):
        lacking.append(method.lacks_room(np.asarray(state.length), num_tokens))
        before, state = state.coded.num_coded, append(state, k, v)
        assert lacking[-1] == bool((state.coded.num_coded > before).any())
    assert 0 < sum(lacking) < len(lacking)


def test_a_longer_call_than_there_is_room_for_makes_its_own():
    method = METHODS["ott"]
    k, v = tokens(200)

    def late(states):
        _, cache = method.make_room(states, 1)
        return tuple(cache.append(state, k, v) for state in states)

    for x, y in zip(jax.jit(late)(empty(method)), empty(method), strict=True):
        assert_same(method, x, method.append(y, k, v))


@pytest.mark.parametrize("method", [METHODS["ott-tight"], METHODS["no-residual"]])
def test_it_does_not_matter_how_many_groups_are_coded_together(method, monkeypatch):
    """Ragged rows, long calls one after another, groups that begin in the window."""
    calls = [([300, 0], 300), ([50, 33], 50), ([1, 1], 1), ([7, 300], 300), ([160, 161], 161)]
    calls = [(*tokens(n, seed=i), jnp.array(new)) for i, (new, n) in enumerate(calls)]

    def run(at_once):
        monkeypatch.setattr(window, "_TOKENS_AT_ONCE", at_once)
        prefill = jax.jit(lambda state, k, v, new: method.prefill(state, k, v, lengths=new))
        state = empty(method)[-1]
        for call in calls:
            state = prefill(state, *call)
        return state

    @jax.jit
    def one_by_one(state, k, v, new):
        def one(state, x):
            k, v, valid = x
            return method.prefill(state, k[:, None], v[:, None], lengths=valid.astype(int)), None

        valid = jnp.arange(k.shape[1])[:, None] < new
        return jax.lax.scan(one, state, (k.swapaxes(0, 1), v.swapaxes(0, 1), valid))[0]

    expected = empty(method)[-1]
    for call in calls:
        expected = one_by_one(expected, *call)
    for at_once in (1, 3 * B * GROUP):
        assert_same(method, run(at_once), expected)


@pytest.mark.parametrize("batch_size, num_tokens", [(1, 131072), (8, 32768)])
@pytest.mark.parametrize("make", [kvq.kivi, kvq.ott])
def test_a_long_prompt_takes_little_memory_besides(make, batch_size, num_tokens):
    spec = kvq.CacheSpec(batch_size, 8, num_tokens, 128, jnp.bfloat16)
    state = jax.eval_shape(lambda: make().init(spec))
    k = jax.ShapeDtypeStruct((batch_size, num_tokens, 8, 128), jnp.bfloat16)
    memory = jax.jit(make().prefill, donate_argnums=0).lower(state, k, k).compile()
    memory = memory.memory_analysis()
    assert memory.alias_size_in_bytes >= kvq.nbytes(state)
    assert memory.temp_size_in_bytes < 0.4 * kvq.nbytes((k, k))


@pytest.mark.parametrize("make", [kvq.kivi, kvq.ott])
def test_a_donated_step_that_makes_room_is_in_place(make):
    method = make(group_size=GROUP)

    def run(states, q, k, v):
        states, cache = method.make_room(states, 1)
        new = []
        for state in states:
            state = cache.append(state, k, v)
            q = q + cache.attend(state, q)
            new.append(state)
        return tuple(new), q

    def measure(capacity):
        spec = kvq.CacheSpec(1, K, capacity, H, jnp.float32)
        states = jax.eval_shape(lambda: tuple(method.init(spec) for _ in range(4)))
        q, k = (jax.ShapeDtypeStruct((1, 1, n, H), jnp.float32) for n in (3 * K, K))
        compiled = jax.jit(run, donate_argnums=0).lower(states, q, k, k).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= kvq.nbytes(states)
        slots = ",".join(map(str, states[0].keys.shape))
        words = ",".join(map(str, states[0].coded.keys.words.shape))
        copies = [x for x in compiled.as_text().splitlines() if " copy(" in x]
        assert not [x for x in copies if f"[{slots}]" in x or f"[{words}]" in x]
        return memory.temp_size_in_bytes, kvq.nbytes(states)

    # As in tests/kernels/memory_test.py: a copy of anything would grow with the cache.
    (temp, state), (more_temp, more_state) = measure(16384), measure(32768)
    assert temp < 0.3 * state
    assert more_temp - temp < 0.03 * (more_state - state)
