# SPDX-License-Identifier: Apache-2.0
"""The public op and the choice of its implementation."""

import logging
import math
from types import ModuleType
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CodedSegment, Implementation, RingKV
from kvq_jax.codecs.affine import Affine
from kvq_jax.codecs.base import Codec
from kvq_jax.kernels.decode_attention import (
    hopper,
    mosaic_gpu,
    mosaic_tpu,
    plain,
    reference,
    tpu,
    xla,
)

log = logging.getLogger(__name__)

_KERNELS: dict[Implementation, tuple[ModuleType, ModuleType, str]] = {
    "mosaic_gpu": (mosaic_gpu, hopper, "a Hopper GPU"),
    "mosaic_tpu": (mosaic_tpu, tpu, "a TPU"),
}
"""The fused kernels: each with the layout that it reads, and where it runs."""


def decode_attention(
    q: Float[Array, "B T N H"],
    length: Int[Array, " B"],
    dense: KV | RingKV,
    coded: CodedSegment | None = None,
    *,
    key_codec: Codec | None = None,
    value_codec: Codec | None = None,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    capacity: int | None = None,
    rope: Float[Array, "B half"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Returns causal attention of the last T tokens over a coded and a dense segment.

    Args:
      q: queries of the tokens at positions length - T ... length - 1 of each row.
      length: tokens of each row, the T new ones included.
      dense: tokens kept as they are.
      coded: tokens kept as codes, if there are any.
      key_codec: codec of `coded.keys`.
      value_codec: codec of `coded.values`.
      sm_scale: factor of the scores; None means 1/sqrt(H).
      sliding_window: a query sees only this many latest tokens, its own included; None means
        all.
      capacity: tokens that a row can hold; one of more attends to NaN. None is no limit.
      rope: radians per token by which each pair of channels of a key is yet to be turned, where
        keys are kept from before rotary embedding; `q` is after it.
      implementation: "mosaic_gpu" is the fused kernel for Hopper GPUs and codes in the `hopper`
        layout, "mosaic_tpu" that for TPUs and the `tpu` layout; "xla" runs anywhere and decodes
        block by block; "reference" decodes all at once in float32. None takes the best for the
        platform and logs which.

    Returns:
      Attention output in the dtype of q. A query that sees no token gives 0.

    Raises:
      ValueError: for shapes that don't fit together and for arguments out of range.
      NotImplementedError: if the implementation asked for can't serve the call.
    """
    _check(q, length, dense, coded, key_codec, value_codec, sliding_window)
    sm_scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    if implementation is None:
        implementation, reason = _best(q, coded, rope)
        log.info("decode_attention of %s runs as %s: %s", q.shape, implementation, reason)
    if implementation in _KERNELS:
        kernel, *_ = _KERNELS[implementation]
        if reason := _against(kernel, q, coded, rope):
            raise NotImplementedError(f"{implementation} can't serve this call: {reason}")
        return kernel.decode_attention(
            q,
            length,
            dense,
            coded,
            key_codec if isinstance(key_codec, Affine) else None,
            value_codec if isinstance(value_codec, Affine) else None,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            capacity=capacity,
        )
    if isinstance(dense, RingKV):
        dense = dense.located(length)
    if capacity is not None:
        overflow = (length > capacity)[:, None, None, None]
        q = jnp.where(overflow, jnp.asarray(jnp.nan, q.dtype), q)
    if implementation == "xla":
        return xla.decode_attention(
            q,
            length,
            dense,
            coded,
            key_codec,
            value_codec,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            rope=rope,
        )
    if implementation == "reference":
        segments = [dense]
        if coded is not None and key_codec is not None and value_codec is not None:
            segments.append(plain.read(coded, key_codec, value_codec, jnp.float32))
        kv = plain.turned(concatenate(*segments), rope)
        return reference.attention(q, kv, length, sm_scale=sm_scale, sliding_window=sliding_window)
    raise ValueError(
        f"implementation must be one of {get_args(Implementation)} or None, got {implementation!r}"
    )


def _against(
    kernel: ModuleType, q: Array, coded: CodedSegment | None, rope: Array | None
) -> str | None:
    """Returns why a fused kernel can't serve a call, or None if it can."""
    if rope is not None:
        return "it reads keys as they are, not from before rotary embedding"
    return kernel.reason_against(q, coded)


def _best(q: Array, coded: CodedSegment | None, rope: Array | None) -> tuple[Implementation, str]:
    """Returns the best implementation for a call and why."""
    for name, (kernel, layout, machine) in _KERNELS.items():
        if layout.available():
            if reason := _against(kernel, q, coded, rope):
                return "xla", f"of {name}, {reason}"
            return name, f"it is the fastest on {machine}"
    return "xla", "there is no Hopper GPU and no TPU"


def concatenate(*segments: KV) -> KV:
    """Joins segments along the slots, in float32 if their dtypes differ."""
    dtypes = {x.keys.dtype for x in segments}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.float32
    whole = [
        KV(
            x.keys.astype(dtype),
            x.values.astype(dtype),
            jnp.broadcast_to(x.positions, x.keys.shape[:-1]),
        )
        for x in segments
    ]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *whole)


def check_queries(q: Array, keys: Array) -> None:
    """Raises `ValueError` if queries, meant to be `B T N H`, don't fit keys `B K S H`."""
    batch, num_kv_heads, _, head_dim = keys.shape
    if q.ndim != 4 or q.shape[0] != batch or q.shape[3] != head_dim:
        raise ValueError(f"q must be [B={batch}, T, N, H={head_dim}], got {q.shape}")
    if q.shape[1] < 1 or q.shape[2] < 1 or q.shape[2] % num_kv_heads:
        raise ValueError(
            f"q must have T >= 1 tokens and a multiple of K={num_kv_heads} heads, got {q.shape}"
        )


def _check(q, length, dense, coded, key_codec, value_codec, sliding_window):
    check_queries(q, dense.keys)
    batch, num_kv_heads, slots, _ = dense.keys.shape
    if dense.values.shape != dense.keys.shape:
        raise ValueError(f"dense: {dense.keys.shape=} is not {dense.values.shape=}")
    if isinstance(dense, RingKV):
        pool, start = dense.pool.shape, dense.start.shape
        if pool[:2] != (batch, num_kv_heads) or pool[2] >= slots or start != (batch,):
            raise ValueError(f"dense: a ring of {pool=}, {start=} does not fit {dense.keys.shape=}")
    elif dense.positions.shape not in {(batch, num_kv_heads, slots), (batch, 1, slots)}:
        raise ValueError(f"dense: {dense.positions.shape=} does not fit {dense.keys.shape=}")
    if length.shape != (batch,):
        raise ValueError(f"length must be [B={batch}], got {length.shape}")
    for name, x in (("dense.keys", dense.keys), ("dense.values", dense.values)):
        if x.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype}, {name} is {x.dtype}: cast one of them")
    if coded is not None and (key_codec is None or value_codec is None):
        raise ValueError("a coded segment needs key_codec and value_codec")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
