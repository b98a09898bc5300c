# SPDX-License-Identifier: Apache-2.0
"""KIVI: keys per channel, values per token.

Idea: a few key channels are large for all tokens, so the keys of a group share a scale per
channel; values have no such channels, so each token has its own. The latest tokens stay in
full precision.

Reference: Liu et al., arXiv 2402.02750, sections 3 and 4.

Parts: `Affine` codecs of two tilings in a `Window`.

Differs from the paper: keys and values are coded together, a group at a time, where the paper
codes the keys of a whole window and one token's values; scale and minimum are rounded outward.

Bytes of a state of one KV head and row, g = group_size, h = min(g, H), d bytes a dense element,
C coded slots (capacity less the window, in whole blocks), W = g + residual_length:

    C H (bits_k + bits_v) / 8 + 4 C H (1/g + 1/h) + 2 W H d

and 4 for each row's length, num_coded and entry of the block table.
"""

from kvq_jax.codecs.affine import Affine
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window

GROUP_SIZES = (32, 64, 128)


def kivi(
    *,
    bits: int = 2,
    value_bits: int | None = None,
    group_size: int = 128,
    value_group_size: int | None = None,
    residual_length: int = 128,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns KIVI.

    Args:
      bits: of keys, and of values unless those have their own; 1 to 8. GPU kernels
        serve 2, 4 and 8.
      value_bits: of values.
      group_size: tokens that share a key scale; 32, 64 or 128.
      value_group_size: channels that share a value scale, a divisor of head_dim; None takes
        group_size, or head_dim where that is smaller.
      residual_length: latest tokens in full precision at the least. As in the paper 128, which
        costs as much memory as 1024 tokens of 2-bit codes.
      tracer: keeps outlier tokens apart; `kvq_jax.ott` is KIVI with one.
    """
    key_codec, value_codec = kivi_codecs(bits, value_bits, group_size, value_group_size)
    return Window(
        key_codec=key_codec,
        value_codec=value_codec,
        group_size=group_size,
        residual_length=residual_length,
        tracer=tracer,
    )


def kivi_codecs(
    bits: int, value_bits: int | None, group_size: int, value_group_size: int | None
) -> tuple[Affine, Affine]:
    """Returns KIVI's codecs of keys and of values; arguments are those of `kivi`."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    return (
        Affine(bits, tile=(group_size, 1)),
        Affine(
            bits if value_bits is None else value_bits,
            tile=(1, group_size if value_group_size is None else value_group_size),
        ),
    )
