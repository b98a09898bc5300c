# SPDX-License-Identifier: Apache-2.0
"""What the fused kernels and their layouts have in common: the forms and calls that they serve."""

from collections.abc import Collection

import jax.numpy as jnp
from jaxtyping import Array, Float

from kvq_jax.base import Attention
from kvq_jax.codecs.base import Codec

BITS = (2, 4, 8)
HEAD_DIMS = (64, 128, 256)
GROUP_SIZES = (32, 64, 128)
MAX_TOKENS = 8


def reason_against_codes(
    attention: Attention, key_codec: Codec, value_codec: Codec, group_size: int, multiple: int = 1
) -> str | None:
    """Returns why a fused layout can't hold these codes, or None if it can.

    Args:
      attention: of the layer.
      key_codec: of a group's keys.
      value_codec: of a group's values.
      group_size: tokens of a group.
      multiple: the number of channels of a value that share a scale must be a multiple of this.
    """
    keys, values = key_codec.form(attention.key_dim), value_codec.form(attention.value_dim)
    if keys is None or values is None:
        return f"it holds affine codes, not those of {key_codec} and {value_codec}"
    for form in (keys, values):
        if form.bits not in BITS:
            return f"codes must be of {BITS} bits, not {form.bits or form.bands}"
        if form.row_factor:
            return "tokens must not have a factor of their own"
        if form.scale_dtype != jnp.float16:
            return f"scales must be float16, not {form.scale_dtype}"
    if keys.tile != (group_size, 1) or values.tile is None or values.tile[0] != 1:
        tiles = f"{keys.tile} and {values.tile}"
        return f"keys must be coded per channel and values per token, not by {tiles}"
    channels = values.tile[1]
    if channels % multiple:
        return f"values must share a scale over a multiple of {multiple} channels, not {channels}"
    if attention.value_dim % channels:
        return f"values must share a scale over a divisor of {attention.value_dim}, not {channels}"
    if group_size not in GROUP_SIZES:
        return f"group_size must be one of {GROUP_SIZES}, not {group_size}"
    return reason_against_attention(attention)


def reason_against_attention(attention: Attention) -> str | None:
    """Returns why the fused kernels can't compute such an attention, or None if they can."""
    if attention.key_dim != attention.value_dim:
        return (
            f"keys of {attention.key_dim} and values of {attention.value_dim} channels: "
            "both must be of the same number"
        )
    if attention.values_in_keys:
        return "values must not be part of the keys"
    if attention.key_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, not {attention.key_dim}"
    if attention.soft_cap is not None:
        return f"it has no soft cap of scores, such as {attention.soft_cap}"
    return None


def reason_against_call(
    attention: Attention, q: Float[Array, "B T N H"], dtypes: Collection[str]
) -> str | None:
    """Returns why a fused kernel can't serve a call, or None if it can.

    Args:
      attention: of the layer.
      q: queries.
      dtypes: that the kernel computes in.
    """
    if q.dtype.name not in dtypes:
        return f"it computes in {' or '.join(dtypes)}, not {q.dtype}"
    if q.shape[1] > MAX_TOKENS:
        return f"it takes up to {MAX_TOKENS} tokens at a time, not {q.shape[1]}"
    return reason_against_attention(attention)
