# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain XLA: blocks of codes are decoded in turn, with a running softmax.

The loop runs over the blocks that hold tokens, not over the capacity, and the dense keys and
values of a few are all that exist at a time. Runs on every platform, for every codec.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CodedSegment
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention import plain

# Where the running maximum starts. Finite: with no token seen yet, -inf - -inf would be NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def decode_attention(
    q: Float[Array, "B T N H"],
    length: Int[Array, " B"],
    dense: KV,
    coded: CodedSegment | None,
    key_codec: Codec | None,
    value_codec: Codec | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
    rope: Float[Array, "B half"] | None = None,
) -> Float[Array, "B T N H"]:
    """Returns attention over both segments; see `api.decode_attention`."""
    batch, num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = dense.keys.shape[1]
    # Query heads of a KV head and new tokens are one axis: rows of one matrix product.
    rows = q.reshape(batch, num_tokens, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, num_kv_heads, -1, head_dim)
    at = length[:, None] - num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
    if num_tokens > 1:  # one token's mask is the same for all rows, and stays one row
        at = jnp.tile(at, (1, num_q_heads // num_kv_heads))
    at = at[:, None, :, None]  # [B, 1, rows, 1]

    def update(carry, keys, values, positions):
        top, total, out = carry
        scores = _matmul("bkrh,bksh->bkrs", rows, keys) * sm_scale
        distance = at - positions[:, :, None, :]
        visible = (positions >= 0)[:, :, None, :] & (distance >= 0)
        if sliding_window is not None:
            visible &= distance < sliding_window
        scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        decay = jnp.exp(top - new_top)
        total = total * decay + weights.sum(-1, keepdims=True)
        out = out * decay + _matmul("bkrs,bksh->bkrh", weights.astype(values.dtype), values)
        return new_top, total, out

    def turn_and_update(carry, keys, values, positions):
        return update(carry, *plain.turned(KV(keys, values, positions), rope))

    shape = rows.shape[:-1]
    carry = (
        jnp.full((*shape, 1), LOWEST, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    if coded is not None and coded.block_table.size:
        carry = _over_coded(carry, update, coded, key_codec, value_codec, q, rope)
    _, total, out = _over_dense(carry, turn_and_update, dense, whole=num_tokens == 1)
    out = out / jnp.where(total == 0, 1, total)
    out = out.reshape(batch, num_kv_heads, -1, num_tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)


def _tokens_at_once() -> int:
    """Returns how many tokens of all rows, times T, to decode together; 0 for a block of each row.

    On a GPU a step of the loop costs the start of its kernels, some 20, and the host waits to
    learn whether there is another. On a CPU a block is best: its cache holds that.
    """
    return 32768 if jax.default_backend() == "gpu" else 0


def _over_coded(
    carry, update: Callable, coded: CodedSegment, key_codec, value_codec, q: Array, rope
):
    batch, num_blocks = coded.block_table.shape

    def read(start, n):
        blocks = jax.lax.dynamic_slice_in_dim(coded.block_table, start, n, axis=1)
        return plain.read_blocks(coded, blocks, key_codec, value_codec, q.dtype)

    size = jax.eval_shape(lambda: read(0, 1))[0].shape[2]
    at_once = _tokens_at_once()
    n = min(num_blocks, max(1, at_once // (batch * size * q.shape[1])))  # scores are as large as T

    def body(i, carry):
        # The last blocks, if they are fewer, are moved back; what they repeat is masked.
        start = jnp.minimum(i * n, num_blocks - n)
        keys, values, mask = read(start, n)
        positions = start * size + jnp.arange(n * size, dtype=jnp.int32)
        # The heads' positions are the same but for holes, so they have their angles together.
        keys = plain.turned(KV(keys, values, positions[None, None]), rope).keys
        positions = jnp.where(mask & (positions >= i * n * size), positions, -1)
        return update(carry, keys, values, positions)

    if at_once and n == num_blocks:  # no loop, then, nor its wait
        return body(0, carry)
    used = jnp.minimum((coded.num_coded.max() + size - 1) // size, num_blocks)
    return jax.lax.fori_loop(0, (used + n - 1) // n, body, carry)


def _over_dense(carry, update: Callable, dense: KV, whole: bool):
    slots = dense.keys.shape[2]
    size = plain.BLOCK_SIZE
    if slots <= size:
        return update(carry, *dense)

    def body(i, carry):
        # The last block of an odd capacity is moved back; what it repeats is masked.
        start = jnp.minimum(i * size, slots - size)
        block = [jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in dense]
        fresh = start + jnp.arange(size) >= i * size
        block[2] = jnp.where(fresh, block[2], -1)
        return update(carry, *block)

    occupied = jnp.where(dense.positions >= 0, jnp.arange(1, slots + 1, dtype=jnp.int32), 0).max()

    def by_block(carry):
        return jax.lax.fori_loop(0, (occupied + size - 1) // size, body, carry)

    if not whole:
        return by_block(carry)
    # XLA copies each block out of the cache; where most of it is occupied, reading all of it
    # in place is twice as fast. Only for few rows, whose scores are small beside the cache.
    return jax.lax.cond(
        occupied > slots // 4 * 3, lambda carry: update(carry, *dense), by_block, carry
    )


def _matmul(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(
        equation, x, y, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
