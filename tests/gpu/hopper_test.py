# SPDX-License-Identifier: Apache-2.0
"""What only a Hopper GPU can show. On a machine that has one, from the root of the checkout:

    python -m pytest tests/gpu -o addopts= -q

`make test` passes this folder over; `make test-gpu` runs it. Without a Hopper GPU it fails. Neither
beartype nor gguf is needed. Where the package can't be installed:

    pip install --no-deps --no-build-isolation --target build/site .
    PYTHONPATH=build/site python -P -m pytest tests/gpu -o addopts= -o pythonpath= -q

Tokens are new in every run; KVQ_SEED repeats one, with the seed that the run has printed.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import logging
import os
import secrets
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.kernels.decode_attention import hopper

jax.config.update("jax_platforms", "")  # tests/conftest.py takes the CPU

# What a GPU's libraries warn of is not ours; an argument that is copied in spite of donation is.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:Some donated buffers"),
]

SEED = int(os.environ.get("KVQ_SEED") or secrets.randbits(31))
# Relative error to the reference, both rounded to the dtype at the end. XLA rounds decoded keys and
# values and weights besides.
MAX_ERROR = {jnp.bfloat16: 3e-3, jnp.float16: 2e-3, jnp.float32: 1e-4}
MAX_XLA_ERROR = {jnp.bfloat16: 2e-2, jnp.float16: 5e-3}
# Of compiling: matrix products as they come, not the fastest of all ways to do them.
QUICK = {"xla_gpu_autotune_level": 0}


@pytest.fixture(autouse=True, scope="module")
def hopper_gpu(request):
    """Fails without the GPU, and says how to repeat the run."""
    if not hopper.available():
        device = jax.devices()[0].device_kind
        pytest.fail(f"tests/gpu needs a Hopper GPU; JAX computes on: {device}", pytrace=False)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"KVQ_SEED={SEED} repeats these tokens")


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, a right-padded batch of prompts, calls of `append` after them, and one `attend`."""

    make: Callable[..., kvq.CacheTransform] = kvq.ott
    bits: tuple[int, int] = (2, 2)
    group_size: int = 128
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    dtype: Any = jnp.bfloat16
    num_tokens: int = 1  # of a call
    sliding_window: int | None = None
    residual_length: int = 32
    prompts: tuple[int, ...] = (650, 417, 3, 0)
    capacity: int = 1024
    value_group_size: int | None = None
    xla: bool = False  # compare with it too

    @property
    def method(self):
        return self.make(
            bits=self.bits[0],
            value_bits=self.bits[1],
            group_size=self.group_size,
            residual_length=self.residual_length,
            value_group_size=self.value_group_size,
        )

    @property
    def spec(self):
        return kvq.CacheSpec(
            len(self.prompts), self.heads[1], self.capacity, self.head_dim, self.dtype
        )

    @property
    def calls(self):
        """Calls after the prompt: enough for each row to code a group, but for the shortest."""
        return self.group_size // self.num_tokens + 2

    def num_coded(self, length):
        excess = max(0, length - self.residual_length - self.group_size)
        return -(-excess // self.group_size) * self.group_size


f16 = jnp.float16
CASES = {
    "llama-2": Case(xla=True),
    "llama-4": Case(bits=(4, 4), make=kvq.kivi),
    "llama-8": Case(bits=(8, 8), group_size=64),
    "smollm-2-f16": Case(
        make=kvq.kivi, heads=(9, 3), head_dim=64, group_size=32, dtype=f16, xla=True
    ),
    "smollm-4": Case(bits=(4, 4), heads=(9, 3), head_dim=64, group_size=64),
    "mha-K4V2": Case(bits=(4, 2), heads=(8, 8), group_size=64, xla=True),
    "K2V8-H64-f16": Case(bits=(2, 8), heads=(8, 2), head_dim=64, dtype=f16),
    "8to1-K8V4": Case(make=kvq.kivi, bits=(8, 4), heads=(8, 1), group_size=32),
    "mha-K2V4-H256": Case(bits=(2, 4), heads=(4, 4), head_dim=256, group_size=64),
    "H256-2": Case(heads=(8, 2), head_dim=256, xla=True),
    "H256-4-f16": Case(bits=(4, 4), heads=(6, 2), head_dim=256, group_size=32, dtype=f16),
    "16to1-H256-8": Case(make=kvq.kivi, bits=(8, 8), heads=(16, 1), head_dim=256),
    "16to1-2": Case(heads=(16, 1), group_size=64),
    "20to2-4-f16": Case(bits=(4, 4), heads=(20, 2), head_dim=64, group_size=32, dtype=f16),
    "T2": Case(num_tokens=2, xla=True),
    "T5-smollm-4": Case(num_tokens=5, bits=(4, 4), heads=(9, 3), head_dim=64, group_size=32),
    "T8-mha": Case(make=kvq.kivi, num_tokens=8, heads=(8, 8), group_size=64),
    "T8-16to1-f16": Case(num_tokens=8, bits=(4, 4), heads=(16, 1), head_dim=64, dtype=f16),
    "T8-H256-K8V2": Case(num_tokens=8, bits=(8, 2), heads=(6, 2), head_dim=256, group_size=32),
    # Tokens of one call are in the codes and in the window.
    "T8-no-residual": Case(num_tokens=8, residual_length=0, heads=(8, 2), group_size=32, xla=True),
    "window-in-dense": Case(sliding_window=7, heads=(8, 2), head_dim=64, group_size=64),
    "window-300": Case(sliding_window=300, heads=(8, 2), group_size=32, xla=True),
    "window-300-T5-f16": Case(
        sliding_window=300, num_tokens=5, heads=(8, 2), group_size=64, bits=(4, 4), dtype=f16
    ),
    "window-beyond-T2": Case(
        sliding_window=5000, num_tokens=2, bits=(4, 2), heads=(4, 2), head_dim=256
    ),
    "value-groups": Case(value_group_size=32, heads=(8, 2)),
    "sink": Case(
        make=lambda **options: kvq.sink(num_sinks=5, **options), heads=(8, 2), group_size=64
    ),
    # All in the window; more splits of a row than a cluster has blocks; more rows than the GPU
    # has multiprocessors.
    "nothing-to-code": Case(heads=(8, 2), prompts=(20, 0), capacity=160),
    "one-long-row": Case(heads=(4, 1), prompts=(40000,), capacity=41000),
    "one-long-row-window-T2": Case(
        heads=(8, 1), prompts=(40000,), capacity=41000, num_tokens=2, sliding_window=20000,
        bits=(4, 4), group_size=64,
    ),
    "many-rows": Case(
        heads=(16, 8), head_dim=64, prompts=tuple(range(0, 600, 15)), capacity=800, group_size=32,
        xla=True,
    ),
}  # fmt: skip


class Compiled(NamedTuple):
    """A case's programs.

    Attributes:
      fill: from tokens and lengths of the prompts to the state.
      attend: from the state and queries to outputs by implementation.
    """

    case: Case
    fill: Callable
    attend: Callable


def random(*shape, seed=0):
    return np.random.default_rng([SEED, seed]).standard_normal(shape, np.float32)


def tokens(batch_size, num_tokens, num_heads, head_dim, seed=0):
    """Keys with a few large channels and a few small tokens, and values."""
    k, v = random(2, batch_size, num_tokens, num_heads, head_dim, seed=seed)
    k += np.where(np.arange(head_dim) % 16 == 3, 4, 0)
    small = np.random.default_rng([SEED, seed, 1]).random(k.shape[:3]) < 0.05
    return k * np.where(small, 0.2, 1)[..., None].astype(np.float32), v


def inputs(case, seed=0):
    """Keys, values, queries of the last call, and lengths of the prompts."""
    batch, (num_q_heads, num_kv_heads) = len(case.prompts), case.heads
    num_tokens = max(case.prompts) + case.calls * case.num_tokens
    kv = tokens(batch, num_tokens, num_kv_heads, case.head_dim, seed)
    q = random(batch, case.num_tokens, num_q_heads, case.head_dim, seed=seed + 1)
    q = jnp.asarray(q).astype(case.dtype)
    return *map(jnp.asarray, kv), q, jnp.asarray(case.prompts, jnp.int32)


def fill(case, k, v, lengths):
    """Returns a state of the prompts and `calls` calls of `append`."""
    method = case.method
    k, v = (x.astype(case.dtype) for x in (k, v))
    prompt, t = max(case.prompts), case.num_tokens
    state = method.prefill(method.init(case.spec), k[:, :prompt], v[:, :prompt], lengths=lengths)

    def call(state, i):
        at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i, slice_size=t, axis=1)
        return method.append(state, at(k), at(v)), None

    starts = prompt + t * jnp.arange(case.calls, dtype=jnp.int32)
    return jax.lax.scan(call, state, starts)[0]


def attend(case, state, q):
    return {
        implementation: case.method.attend(
            state, q, sliding_window=case.sliding_window, implementation=implementation
        )
        for implementation in ("mosaic_gpu", "reference", *(["xla"] if case.xla else []))
    }


@pytest.fixture(scope="module")
def programs(request):
    """Compiles the cases of all tests that run, in threads, and returns them by name."""
    params = [getattr(item, "callspec", None) for item in request.session.items]
    names = {x.params["name"] for x in params if x and "name" in x.params}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        started = {}
        for name in [x for x in CASES if x in names]:
            case = CASES[name]
            *arrays, q, lengths = jax.eval_shape(functools.partial(inputs, case))
            filling = jax.jit(functools.partial(fill, case)).lower(*arrays, lengths)
            attending = jax.jit(functools.partial(attend, case)).lower(filling.out_info, q)
            started[name] = [
                pool.submit(x.compile, compiler_options=QUICK) for x in (filling, attending)
            ]

        def get(name):
            return Compiled(CASES[name], *(x.result() for x in started[name]))

        yield get


def by_name(*names):
    return pytest.mark.parametrize("name", names or list(CASES))


def error_by_row(out, expected):
    """Relative errors by the Frobenius norm, of each row of the batch."""
    out, expected = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (out, expected))
    norm = np.linalg.norm(expected, axis=1)
    return np.linalg.norm(out - expected, axis=1) / np.where(norm == 0, 1, norm)


def check(case, outs):
    """The kernel's output is the reference's, and XLA's roughly."""
    out, expected = outs["mosaic_gpu"], outs["reference"]
    assert out.shape == expected.shape and out.dtype == case.dtype
    error = error_by_row(out, expected)
    assert (error < MAX_ERROR[case.dtype]).all(), error  # False for NaN
    if case.xla:
        error = error_by_row(outs["xla"], expected)
        assert (error < MAX_XLA_ERROR[case.dtype]).all(), f"xla: {error}"


@by_name()
def test_attend_is_the_reference(name, programs):
    case, fill, attend = programs(name)
    k, v, q, lengths = inputs(case)
    state = fill(k, v, lengths)
    assert isinstance(state.coded.keys, hopper.TileCode), "not the default layout of a Hopper GPU"
    added = case.calls * case.num_tokens
    assert state.length.tolist() == [n + added for n in case.prompts]
    assert state.coded.num_coded.tolist() == [case.num_coded(n + added) for n in case.prompts]
    if name != "nothing-to-code":
        longest = max(case.prompts)
        assert case.num_coded(longest + added) > case.num_coded(longest), "no group was coded"
    outs = attend(state, q)
    check(case, outs)
    # Teeth: with the values of a tile of tokens lost, 16 of up to 40000, the same check fails.
    positions = case.method.segments(state).dense.located(state.length).positions[0]
    late = (positions >= state.length[0] - 16)[..., None]
    lost = state._replace(values=state.values.at[0].set(jnp.where(late, 0, state.values[0])))
    wrong = attend(lost, q)["mosaic_gpu"]
    assert error_by_row(wrong, outs["reference"])[0] > 2 * MAX_ERROR[case.dtype]


EDGES = by_name("llama-2", "T5-smollm-4", "window-300", "one-long-row", "many-rows", "H256-2")


@EDGES
def test_an_empty_cache_gives_zero(name, programs):
    case, _, attend = programs(name)
    outs = attend(case.method.init(case.spec), inputs(case)[2])
    assert (outs["mosaic_gpu"] == 0).all() and (outs["reference"] == 0).all()


@EDGES
def test_blocks_of_holes(name, programs):
    """A block without a token at the start, at the end, and nothing but holes."""
    case, fill, attend = programs(name)
    k, v, q, lengths = inputs(case, seed=2)
    state = fill(k, v, lengths)
    table = np.asarray(state.coded.block_table)
    row = int(np.argmax(case.prompts))
    for blocks in (table[row, :1], table[row, -1:], table[row], table.reshape(-1)):
        holes = jax.tree.map(lambda x, at=blocks: x.at[at].set(0), state.coded.values)
        outs = attend(state._replace(coded=state.coded._replace(values=holes)), q)
        check(case, outs)


@EDGES
def test_an_overflow_is_nan_in_its_row_only(name, programs):
    case, fill, attend = programs(name)
    k, v, q, lengths = inputs(case, seed=3)
    state = fill(k, v, lengths)
    capacity = case.method.capacity(state)
    before = attend(state, q)["mosaic_gpu"]
    full = attend(state._replace(length=state.length.at[0].set(capacity)), q)["mosaic_gpu"]
    assert jnp.isfinite(full).all()
    over = attend(state._replace(length=state.length.at[0].set(capacity + 1)), q)["mosaic_gpu"]
    assert jnp.isnan(over[0]).all()
    np.testing.assert_array_equal(over[1:], before[1:])


@EDGES
def test_nan_is_not_silent(name, programs):
    case, fill, attend = programs(name)
    k, v, q, lengths = inputs(case, seed=4)
    state = fill(k, v, lengths)
    before = attend(state, q)["mosaic_gpu"]
    group = case.heads[0] // case.heads[1]
    dense = case.method.segments(state).dense.located(state.length)
    at = 0, 0, int(jnp.argmax(dense.positions[0, 0])), 3  # the last token, seen by the last query
    for part in ("q", "keys", "values"):
        if part == "q":
            out = attend(state, q.at[0, -1, 0, 3].set(jnp.nan))["mosaic_gpu"]
            assert jnp.isnan(out[0, -1, 0]).all(), part
        else:
            spoilt = state._replace(**{part: getattr(state, part).at[at].set(jnp.nan)})
            out = attend(spoilt, q)["mosaic_gpu"]
            assert jnp.isnan(out[0, -1, :group]).any(-1).all(), part
        np.testing.assert_array_equal(out[0, :, group:], before[0, :, group:])
        np.testing.assert_array_equal(out[1:], before[1:])


@EDGES
def test_nothing_is_read_that_was_not_written(name, programs):
    """Calls into memory full of garbage give the same bits."""
    case, fill, attend = programs(name)
    k, v, q, lengths = inputs(case, seed=5)
    state = fill(k, v, lengths)
    expected = attend(state, q)["mosaic_gpu"]
    for garbage in (jnp.nan, 1e30):
        # Every other one is freed, so that the holes stay apart.
        sizes = [256 << i for i in range(0, 17, 2)] + [expected.nbytes // 4]
        dirty = [jnp.full(n, garbage, jnp.float32) for n in sizes for _ in range(8)]
        jax.block_until_ready(dirty)
        del dirty[::2]
        outs = [attend(state, q)["mosaic_gpu"] for _ in range(3)]
        for out in outs:
            np.testing.assert_array_equal(out, expected)


def logged(caplog, method, state, q, **options):
    """What the dispatch says of a call."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kvq_jax.kernels.decode_attention.api"):
        jax.eval_shape(functools.partial(method.attend, **options), state, q)
    return caplog.text


def test_dispatch_takes_the_kernel_and_says_so(caplog):
    case = Case()

    def say(method, num_tokens=1, dtype=case.dtype):
        spec = dataclasses.replace(case.spec, dtype=dtype)
        state = jax.eval_shape(functools.partial(method.init, spec))
        q = jax.ShapeDtypeStruct((len(case.prompts), num_tokens, 32, 128), dtype)
        return logged(caplog, method, state, q)

    for method in (kvq.kivi(bits=8), kvq.ott(), kvq.sink(bits=4), kvq.dense()):
        for dtype in (jnp.bfloat16, jnp.float16):
            assert "runs as mosaic_gpu" in say(method, 8, dtype)
        for text in (say(method, 9), say(method, dtype=jnp.float32)):
            assert "runs as xla: of mosaic_gpu, it" in text
    plain = dataclasses.replace(kvq.ott(), layout="plain")
    assert 'runs as xla: of mosaic_gpu, the codes are not in the "hopper" layout' in say(plain)


@pytest.mark.parametrize("layout", [None, "hopper"])
def test_float32_runs_as_xla(layout):
    """By itself on the plain layout, and on this one if it has to."""

    def make(**options):
        return dataclasses.replace(kvq.ott(**options), layout=layout)

    case = Case(make=make, dtype=jnp.float32, heads=(8, 2), group_size=64)
    k, v, q, lengths = inputs(case)
    state = jax.jit(functools.partial(fill, case))(k, v, lengths)
    assert isinstance(state.coded.keys, hopper.TileCode) == (layout == "hopper")
    out = jax.jit(case.method.attend)(state, q)
    expected = jax.jit(functools.partial(case.method.attend, implementation="reference"))(state, q)
    assert (error_by_row(out, expected) < MAX_ERROR[jnp.float32]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("num_tokens, sliding_window", [(1, None), (5, None), (1, 300)])
def test_a_dense_cache(num_tokens, sliding_window, dtype):
    """Its capacity is 5000, of which most is not used, some, and all."""
    method, lengths = kvq.dense(), (1, 700, 5000)
    state = method.init(kvq.CacheSpec(3, 2, 5000, 128, dtype))
    k, v = (jnp.asarray(x).astype(dtype).swapaxes(1, 2) for x in tokens(3, 5000, 2, 128))
    state = state._replace(keys=k, values=v, length=jnp.asarray(lengths, jnp.int32))
    q = jnp.asarray(random(3, num_tokens, 8, 128, seed=9)).astype(dtype)

    def run(state, q):
        run = functools.partial(method.attend, state, q, sliding_window=sliding_window)
        return [run(implementation=x) for x in ("mosaic_gpu", "reference", None)]

    out, expected, default = jax.jit(run)(state, q)
    error = error_by_row(out, expected)
    assert (error < MAX_ERROR[dtype]).all(), error
    np.testing.assert_array_equal(out, default)


# Decoding

LAYERS, NEW, GROUP, RESIDUAL = 2, 75, 32, 16


def pointers(states):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(states)]


def decode(method, num_tokens, ahead, implementation):
    """Decodes 75 tokens in two layers.

    Returns the states, the outputs of the last step, and how many arrays have moved.
    """
    spec = kvq.CacheSpec(3, 2, 512, 64, jnp.bfloat16)
    prompts = jnp.asarray([130, 37, 0], jnp.int32)
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in tokens(3, 130 + NEW, 2, 64))
    q = jnp.asarray(random(3, NEW // num_tokens, num_tokens, 6, 64, seed=1), jnp.bfloat16)

    @jax.jit
    def start():
        return tuple(
            method.prefill(method.init(spec, 2 + i), k[:, :130], v[:, :130], lengths=prompts)
            for i in range(LAYERS)
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states, k, v, q, i):
        cache = method
        if ahead:
            states, cache = method.make_room(states, num_tokens)
        k, v = (
            jax.lax.dynamic_slice_in_dim(x, 130 + num_tokens * i, num_tokens, 1) for x in (k, v)
        )
        q, new, outs = jax.lax.dynamic_index_in_dim(q, i, 1, keepdims=False), [], []
        for layer, state in enumerate(states):
            new.append(cache.append(state, k * (layer + 1), v))
            outs.append(cache.attend(new[-1], q, implementation=implementation))
        return tuple(new), outs

    states = start()
    donated, coded = states, jnp.copy(states[0].coded.num_coded)
    outs, where = None, pointers(states)
    for i in range(NEW // num_tokens):
        states, outs = step(states, k, v, q, jnp.int32(i))
    assert all(x.is_deleted() for x in jax.tree.leaves(donated)), "nothing was donated"
    assert step._cache_size() == 1
    assert (states[0].coded.num_coded - coded >= GROUP).all(), "no group was coded"
    moved = sum(x != y for x, y in zip(where, pointers(states), strict=True))
    return states, outs, moved


def in_order(method, state):
    """Positions, keys and values by position; layouts differ in the slots that no token is in."""
    kv = jax.tree.map(np.asarray, method.read(state))
    late = np.where(kv.positions < 0, np.iinfo(np.int32).max, kv.positions)
    order = np.argsort(late, -1, kind="stable")[..., : int(state.length.max())]
    positions, mask = (np.take_along_axis(x, order, -1) for x in (kv.positions, kv.mask))
    keys, values = (np.take_along_axis(x, order[..., None], 2) for x in (kv.keys, kv.values))
    return positions, *(np.where(mask[..., None], x, 0).astype(np.float32) for x in (keys, values))


def assert_same(method, x, other, y):
    """Two states hold the same tokens; a rounding may go the other way in one of a thousand."""
    np.testing.assert_array_equal(x.length, y.length)
    np.testing.assert_array_equal(x.coded.num_coded, y.coded.num_coded)
    if x.pool:
        np.testing.assert_array_equal(x.pool.positions, y.pool.positions)
    (positions, *tokens), (expected, *others) = in_order(method, x), in_order(other, y)
    np.testing.assert_array_equal(positions, expected)
    for p, q in zip(tokens, others, strict=True):
        wrong = np.abs(p - q) > 1e-2 + 2**-7 * np.abs(q)
        assert wrong.mean() < 1e-3, wrong.mean()


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("make", [kvq.kivi, kvq.ott])
def test_a_decode_loop(make, num_tokens):
    """Layouts hold the same; so does room made ahead; everything is written in place."""
    method = make(group_size=GROUP, residual_length=RESIDUAL)
    plain = dataclasses.replace(method, layout="plain")
    states, outs, moved = decode(method, num_tokens, False, None)
    assert isinstance(states[0].coded.keys, hopper.TileCode)
    assert not moved
    ahead, ahead_outs, moved = decode(method, num_tokens, True, None)
    assert not moved
    expected, expected_outs, _ = decode(plain, num_tokens, False, "reference")
    assert not isinstance(expected[0].coded.keys, hopper.TileCode)
    for layer in range(LAYERS):
        assert_same(method, states[layer], plain, expected[layer])
        assert_same(method, states[layer], method, ahead[layer])
        for out in (outs[layer], ahead_outs[layer]):
            error = error_by_row(out, expected_outs[layer])
            assert (error < MAX_ERROR[jnp.bfloat16]).all(), error


# Prefill


def model_attention():
    """Returns `kvq_jax.models.attention`, also where that package's readers can't be imported."""
    try:
        return importlib.import_module("kvq_jax.models.attention")
    except ImportError:
        spec = importlib.util.find_spec("kvq_jax.models")
        package = types.ModuleType("kvq_jax.models")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["kvq_jax.models"] = package
        return importlib.import_module("kvq_jax.models.attention")


@pytest.mark.parametrize("sliding_window", [None, 200])
@pytest.mark.parametrize(
    "num_tokens, head_dim, heads, dtype",
    [
        (1100, 128, (8, 2), jnp.bfloat16),
        (701, 64, (9, 3), jnp.float16),
        (320, 256, (4, 4), jnp.bfloat16),
    ],
    ids=["H128", "H64-f16", "H256"],
)
def test_prefill_attention_is_that_in_float32(num_tokens, head_dim, heads, sliding_window, dtype):
    attention = model_attention()
    k, v = tokens(2, num_tokens, heads[1], head_dim)
    q = random(2, num_tokens, heads[0], head_dim, seed=1)
    rounded = [jnp.asarray(x).astype(dtype) for x in (q, k, v)]
    run = jax.jit(functools.partial(attention.causal_attention, sliding_window=sliding_window))
    assert "cudnn" in run.lower(*rounded).as_text()
    out = run(*rounded)
    exact = [x.astype(jnp.float32) for x in rounded]
    assert "cudnn" not in run.lower(*exact).as_text()
    expected = run(*exact)
    assert out.dtype == dtype
    # By token: of the first ones, whose outputs are large, none hides the others.
    error = error_by_row(*(jnp.moveaxis(x, 1, 0).astype(jnp.float32) for x in (out, expected)))
    assert (error < 4 * float(jnp.finfo(dtype).eps)).all(), error.max()
    assert np.sqrt(np.square(error).mean()) < float(jnp.finfo(dtype).eps)
    if sliding_window:
        assert error_by_row(out, jax.jit(attention.causal_attention)(*exact)).max() > 0.1
