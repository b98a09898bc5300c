# SPDX-License-Identifier: Apache-2.0
"""What the fused kernels and their layouts have in common: what they can hold and serve."""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvq_jax.base import CacheSpec, CodedSegment
from kvq_jax.codecs.affine import Affine
from kvq_jax.codecs.base import Codec

BITS = (2, 4, 8)
HEAD_DIMS = (64, 128, 256)
GROUP_SIZES = (32, 64, 128)
MAX_TOKENS = 8


def reason_against(
    spec: CacheSpec, key_codec: Codec, value_codec: Codec, group_size: int, multiple: int = 1
) -> str | None:
    """Returns why such a layout can't hold these codes, or None if it can.

    Args:
      spec: of the cache.
      key_codec: of a group's keys.
      value_codec: of its values.
      group_size: tokens of a group.
      multiple: of which the channels of a token's value that share a scale must be one.
    """
    if not isinstance(key_codec, Affine) or not isinstance(value_codec, Affine):
        return f"it holds affine codes, not those of {key_codec} and {value_codec}"
    for codec in (key_codec, value_codec):
        if codec.bits not in BITS:
            return f"codes must be of {BITS} bits, not {codec.bits}"
        if jnp.dtype(codec.scale_dtype) != jnp.float16:
            return f"scales must be float16, not {jnp.dtype(codec.scale_dtype)}"
    if key_codec.tile != (group_size, 1) or value_codec.tile[0] != 1:
        tiles = f"{key_codec.tile} and {value_codec.tile}"
        return f"keys must be coded per channel and values per token, not by {tiles}"
    channels = min(value_codec.tile[1], spec.head_dim)
    if channels % multiple:
        return f"values must share a scale over a multiple of {multiple} channels, not {channels}"
    if spec.head_dim % channels:
        return f"values must share a scale over a divisor of {spec.head_dim}, not {channels}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, not {spec.head_dim}"
    if group_size not in GROUP_SIZES:
        return f"group_size must be one of {GROUP_SIZES}, not {group_size}"
    return None


def reason_against_call(
    q: Float[Array, "B T N H"],
    coded: CodedSegment | None,
    *,
    dtypes: Collection[str],
    layout: str,
    code: type,
) -> str | None:
    """Returns why such a kernel can't serve a call, or None if it can.

    Args:
      q: queries.
      coded: tokens kept as codes, if there are any.
      dtypes: that it computes in.
      layout: that it reads.
      code: of this layout.
    """
    if q.dtype.name not in dtypes:
        return f"it computes in {' or '.join(dtypes)}, not {q.dtype}"
    if q.shape[1] > MAX_TOKENS:
        return f"it takes up to {MAX_TOKENS} tokens at a time, not {q.shape[1]}"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, not {q.shape[3]}"
    if coded is not None and not isinstance(coded.keys, code):
        return f'the codes are not in the "{layout}" layout'
    return None
