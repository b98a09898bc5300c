# SPDX-License-Identifier: Apache-2.0
"""What the layouts of the fused kernels have in common: the codes they can hold."""

import jax.numpy as jnp

from kvq_jax.base import CacheSpec
from kvq_jax.codecs.affine import Affine
from kvq_jax.codecs.base import Codec

BITS = (2, 4, 8)
HEAD_DIMS = (64, 128, 256)
GROUP_SIZES = (32, 64, 128)


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
