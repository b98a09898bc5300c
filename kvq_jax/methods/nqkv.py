# SPDX-License-Identifier: Apache-2.0
"""NQKV: the numbers of a token are nearly normal, so their levels are normal quantiles.

Idea: blocks of a token's channels are stored as 4-bit NormalFloat, whose levels are equally
likely for a normal distribution, times the largest magnitude of the block.

Reference: NQKV, arXiv 2505.16210.

Parts: `Table` codecs with the levels of `normal_float`, keys and values alike, in a `Window`.

Differs from the paper: a block ends with its head, where the paper's 256 channels may span
several; tokens are coded a group at a time, and are in full precision until then.

Bytes of a state of one KV head and row, g = group_size, h = min(block_size, H), d bytes a dense
element, C coded slots (capacity less the window, in whole blocks), W = g + residual_length:

    C H (bits_k + bits_v) / 8 + 4 C H / h + 2 W H d

and 4 for each row's length, num_coded and entry of the block table.
"""

from kvq_jax.codecs.levels import normal_float
from kvq_jax.codecs.table import Table
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window


def nqkv(
    *,
    bits: int = 4,
    value_bits: int | None = None,
    block_size: int = 256,
    group_size: int = 32,
    residual_length: int = 0,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns NQKV with the paper's settings.

    Args:
      bits: of keys, and of values unless those have their own; 2 to 8.
      value_bits: of values.
      block_size: channels of a token that share a scale, cut to head_dim.
      group_size: tokens coded at a time, a multiple of 32.
      residual_length: latest tokens in full precision at the least; the paper has none.
      tracer: keeps outlier tokens apart.
    """
    key_codec, value_codec = (
        Table(b, tile=(1, block_size), levels=normal_float(b))
        for b in (bits, bits if value_bits is None else value_bits)
    )
    return Window(
        key_codec=key_codec,
        value_codec=value_codec,
        group_size=group_size,
        residual_length=residual_length,
        tracer=tracer,
    )
