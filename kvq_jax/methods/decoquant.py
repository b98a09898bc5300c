# SPDX-License-Identifier: Apache-2.0
"""DecoQuant: a matrix is a large factor of narrow range times a tiny one; only the large is coded.

Idea: the authors factor each cached matrix by a matrix product operator. With two factors that is
a linear map of blocks of channels, the same for all tokens and blocks, under which the roots of
the principal spreads change sides: what is left has a narrower range, and the map is tiny.

Reference: Liu et al., arXiv 2405.12591.

Parts: `BlockLinear` frames fitted to the prompt, `Table` codecs with the levels of `symmetric`, a
`Window`.

Differs from the paper: the map is computed from a covariance of block_size channels, not by a
singular value decomposition of the whole matrix, which gives the same; it is fitted to the prompt
and kept for what follows, where the paper leaves new tokens in full precision; a scale ends with
its head, where the paper's spans all heads of a token.

Bytes of a state of one KV head and row, g = group_size, d bytes a dense element, C coded slots
(capacity less the window, in whole blocks), W = g + residual_length:

    C H (bits_k + bits_v) / 8 + 4 C + 2 W H d

and for each row 16 b² for the maps of b = block_size channels, and 4 for its length, num_coded and
entry of the block table.
"""

from kvq_jax.codecs.frames import BlockLinear
from kvq_jax.codecs.levels import symmetric
from kvq_jax.codecs.table import Table
from kvq_jax.codecs.tiled import WHOLE_HEAD
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window


def decoquant(
    *,
    bits: int = 4,
    value_bits: int | None = None,
    block_size: int = 16,
    group_size: int = 32,
    residual_length: int = 0,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns DecoQuant.

    Args:
      bits: of keys, and of values unless those have their own; 2 to 8.
      value_bits: of values.
      block_size: channels that are mapped together, a divisor of head_dim.
      group_size: tokens coded at a time, a multiple of 32.
      residual_length: latest tokens in full precision at the least.
      tracer: keeps outlier tokens apart. It sees keys as they are mapped.
    """
    key_codec, value_codec = (
        Table(b, tile=(1, WHOLE_HEAD), levels=symmetric(b))
        for b in (bits, bits if value_bits is None else value_bits)
    )
    return Window(
        key_codec=key_codec,
        value_codec=value_codec,
        group_size=group_size,
        residual_length=residual_length,
        key_frame=BlockLinear(block_size),
        value_frame=BlockLinear(block_size),
        tracer=tracer,
    )
