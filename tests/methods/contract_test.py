# SPDX-License-Identifier: Apache-2.0
"""What is true of every method: one matrix, a row a method (`cases.py`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import measure
from kvq_jax.codecs.base import Sample
from kvq_jax.kernels.decode_attention import plain
from kvq_jax.models import DecoderConfig
from kvq_jax.rope import turn
from tests.methods.cases import CASES, SHAPES, Shape

NUM_TOKENS = 210  # several groups of 32, not a whole number of them
CAPACITY = 256

methods = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
matrix = pytest.mark.parametrize(
    "case, shape",
    [
        pytest.param(case, shape, id=f"{name}-{size}")
        for name, case in CASES.items()
        for size, shape in SHAPES.items()
        if size in case.shapes
    ],
)


def tokens(shape, key, num_tokens=NUM_TOKENS):
    """Keys with a few large channels and a few small tokens, values and queries."""
    kk, kv, kq, kt = jax.random.split(key, 4)
    size = (shape.batch_size, num_tokens, shape.num_kv_heads, shape.head_dim)
    k = jax.random.normal(kk, size) + jnp.where(jnp.arange(shape.head_dim) % 16 == 3, 4.0, 0.0)
    k = k * jnp.where(jax.random.uniform(kt, size[:3])[..., None] < 0.05, 0.2, 1.0)
    v = jax.random.normal(kv, size)
    q = jax.random.normal(kq, (shape.batch_size, num_tokens, shape.num_q_heads, shape.head_dim))
    return (x.astype(shape.dtype) for x in (k, v, q))


@functools.cache
def functions(method):
    """The method's functions, jitted once for all tests."""
    return jax.jit(method.append), jax.jit(method.prefill), jax.jit(method.attend)


def init(method, spec):
    """An empty state; fitted to tokens other than those of any test, where the method needs it."""
    state = method.init(spec)
    if not method.needs_texts:
        return state
    return method.with_params(state, params(method, spec.num_kv_heads, spec.head_dim))


@functools.cache
def params(method, num_kv_heads, head_dim):
    """What `kvq_jax.calibrate` would make of random tokens, for one layer."""
    shape = Shape(1, num_kv_heads, num_kv_heads, head_dim, jnp.float32)
    k, v, _ = tokens(shape, jax.random.key(1), 2048)
    mask = jnp.ones(k.shape[:2], bool)
    return method.calibrate(Sample(k, mask), Sample(v, mask))


def one_by_one(method, state, k, v):
    """Appends token by token in a scan, which holds the state's structure to be fixed."""

    def step(state, kv):
        return method.append(state, *(x[:, None] for x in kv)), None

    run = jax.jit(lambda state, kv: jax.lax.scan(step, state, kv)[0])
    return run(state, (k.swapaxes(0, 1), v.swapaxes(0, 1)))


def filled(case, shape, key, lengths=None, bits=2, value_bits=2):
    """A method, a state of NUM_TOKENS tokens (or of `lengths`), and the tokens."""
    method = case.make(bits, value_bits)
    k, v, q = tokens(shape, key)
    state = init(method, shape.spec(CAPACITY))
    return method, functions(method)[1](state, k, v, q=q, lengths=lengths), (k, v, q)


def assert_same(method, x, y):
    """Two states hold the same to the last bit; what unused dense slots hold aside."""

    def used(state):
        kv = method.read(state)
        keys, values = (jnp.where(kv.mask[..., None], a, 0) for a in (kv.keys, kv.values))
        return kv.positions, keys, values, state._replace(keys=(), values=())

    jax.tree.map(np.testing.assert_array_equal, used(x), used(y))


def dense_attention(q, kv, length):
    """Attention over what `read` returns, by JAX's own function, in float32."""
    num_tokens = q.shape[1]
    at = length[:, None] - num_tokens + jnp.arange(num_tokens)
    positions = jnp.broadcast_to(kv.positions, kv.keys.shape[:3])
    mask = (positions >= 0)[:, :, None] & (positions[:, :, None] <= at[:, None, :, None])
    mask = jnp.repeat(mask, q.shape[2] // kv.keys.shape[1], axis=1)
    q, k, v = (x.astype(jnp.float32) for x in (q, kv.keys, kv.values))
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask)


def as_attended(method, k, shape):
    """Keys `B T K H` that stand at the first positions, as attention sees them."""
    if not method.pre_rope:
        return k
    positions = jnp.arange(k.shape[1], dtype=jnp.float32)[:, None, None]
    return turn(k, positions * jnp.array(shape.spec(1).rope))


def worst_row(x, y):
    """The largest error of a (row, token, head), relative to that row's norm."""
    x, y = (np.asarray(a, np.float32) for a in (x, y))
    error = np.linalg.norm(x - y, axis=-1) / np.maximum(np.linalg.norm(y, axis=-1), 1e-6)
    return error.max()


def tolerance(shape):
    """Roundings of query, weights and output to the dtype, and of float32 sums over H."""
    sums = float(jnp.finfo(jnp.float32).eps) * shape.head_dim**0.5
    return 4 * (float(jnp.finfo(shape.dtype).eps) + sums)


@matrix
def test_attend_is_dense_attention_over_read(case, shape, getkey):
    lengths = jnp.array([NUM_TOKENS, 77][: shape.batch_size])
    method, state, (_, _, q) = filled(case, shape, getkey(), lengths)
    kv = jax.jit(method.read)(state)
    bound = tolerance(shape)
    for num_queries in (1, 3):
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
    method = case.make(2, 4)
    k, v, _ = tokens(shape, getkey())
    empty = init(method, shape.spec(CAPACITY))
    append, prefill, _ = functions(method)
    # What a prompt is fitted to stays as it is while tokens come by other calls.
    whole = (append if method.needs_prompt else prefill)(empty, k, v)
    assert_same(method, one_by_one(method, empty, k, v), whole)
    if shape == SHAPES["gqa"]:
        cuts, state = [1, 50, 70, 71, 180], empty
        for start, stop in zip([0, *cuts], [*cuts, NUM_TOKENS], strict=True):
            state = append(state, k[:, start:stop], v[:, start:stop])
        assert_same(method, state, whole)


@methods
def test_padding_is_ignored_and_rows_are_independent(case, getkey):
    shape = SHAPES["gqa"]
    method = case.make(2, 2)
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
    method = case.make(2, 2)
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


@methods
def test_exact_calls_attend_as_single_tokens_do(case, getkey):
    shape = SHAPES["mha"]
    method = case.make(2, 2)
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


@matrix
def test_more_bits_are_never_worse(case, shape, getkey):
    key, errors = getkey(), []
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
        assert errors[2] < case.worst_output + tolerance(shape)


@matrix
@pytest.mark.parametrize("capacity", [20, 200, 3000])
def test_nbytes_is_the_formula_of_the_docstring(case, shape, capacity):
    for bits, value_bits in ((2, 2), (4, 2), (8, 4)):
        method = case.make(bits, value_bits)
        spec = shape.spec(capacity)
        state = init(method, spec)
        assert method.capacity(state) >= capacity
        coded = blocks = 0
        if isinstance(method, kvq.Window):
            blocks = state.coded.block_table.shape[1]
            coded = blocks * plain.block_size(state.coded, method.group_size)
        assert kvq.nbytes(state) == case.nbytes(spec, bits, value_bits, coded, blocks)
        assert kvq.nbytes(state) == sum(x.nbytes for x in jax.tree.leaves(state))
        assert kvq.nbytes(state) == sum(kvq.nbytes_by_part(state).values())


@methods
def test_vmaps_over_layers(case, getkey):
    shape = SHAPES["gqa"]
    method = case.make(2, 2)
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


@methods
def test_capacity_is_kept_and_going_beyond_is_loud(case, getkey):
    shape = SHAPES["gqa"]
    method = case.make(2, 2)
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
    method = case.make(2, 2)
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
