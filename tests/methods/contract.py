# SPDX-License-Identifier: Apache-2.0
"""What tests of every method share: tokens, states of them, and what they should give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvq_jax.codecs.base import Sample
from kvq_jax.rope import turn
from tests.methods.cases import Shape

NUM_TOKENS = 210  # several groups of 32, not a whole number of them
CAPACITY = 256


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
    return method.with_params(state, fitted(method, spec.num_kv_heads, spec.head_dim)[1])


def make(case, shape, bits=2, value_bits=2):
    """A case's method, as fitted where it must be."""
    return fitted(case.make(bits, value_bits), shape.num_kv_heads, shape.head_dim)[0]


@functools.cache
def fitted(method, num_kv_heads, head_dim):
    """The method and parameters that `kvq_jax.calibrate` would make of random tokens of a layer.

    Of as many as it takes by default: of 2048, eight to each of CQ's 256 centroids, numbers of a
    test lie up to 1.3 beyond all centroids, and attention is off by up to 7%, not 2.3%.
    """
    if not method.needs_texts:
        return method, ()
    shape = Shape(1, num_kv_heads, num_kv_heads, head_dim, jnp.float32)
    k, v, _ = tokens(shape, jax.random.key(1), 8192)
    mask = jnp.ones(k.shape[:2], bool)
    layer = method.calibrate(Sample(k, mask), Sample(v, mask))
    method, (params,) = method.settle([layer], num_kv_heads)
    return method, params


def one_by_one(method, state, k, v):
    """Appends token by token in a scan, which holds the state's structure to be fixed."""

    def step(state, kv):
        return method.append(state, *(x[:, None] for x in kv)), None

    run = jax.jit(lambda state, kv: jax.lax.scan(step, state, kv)[0])
    return run(state, (k.swapaxes(0, 1), v.swapaxes(0, 1)))


def filled(case, shape, key, lengths=None, bits=2, value_bits=2):
    """A method, a state of NUM_TOKENS tokens (or of `lengths`), and the tokens."""
    method = make(case, shape, bits, value_bits)
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
    angle = positions * jnp.array(shape.spec(1).rope)
    return turn(k, jnp.cos(angle), jnp.sin(angle))


def worst_row(x, y):
    """The largest error of a (row, token, head), relative to that row's norm."""
    x, y = (np.asarray(a, np.float32) for a in (x, y))
    error = np.linalg.norm(x - y, axis=-1) / np.maximum(np.linalg.norm(y, axis=-1), 1e-6)
    return error.max()


def tolerance(shape):
    """Roundings of query, weights and output to the dtype, and of float32 sums over H."""
    sums = float(jnp.finfo(jnp.float32).eps) * shape.head_dim**0.5
    return 4 * (float(jnp.finfo(shape.dtype).eps) + sums)
