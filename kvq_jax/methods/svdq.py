# SPDX-License-Identifier: Apache-2.0
"""SVDq: keys in principal coordinates, of which the last need no bits.

Idea: before rotary embedding the keys of a layer vary in few directions. In these coordinates
the leading bands of channels get many bits, later ones few, and the last none.

Reference: SVDq, arXiv 2502.15304.

Parts: a `Latent` codec of keys from before rotary embedding, an `Affine` one of values, a `Window`
with an `OutlierTracer` whose score is the position.

Differs from the paper: values have 8 bits, where the paper leaves them alone, and no tokens are
dropped besides; the first token, whose key is unlike all others, is left alone; new
tokens are coded as the prompt is; scales are per group of tokens. The default schedule is not the
paper's example (8, 4, 2, 1, 1, 0, 0, 0), whose bands of 1 bit cost more than they save.

Bytes of a state of one KV head and row, g = group_size, h = min(g, H), d bytes a dense element,
C coded slots (capacity less the window, in whole blocks), W = g + residual_length, P = num_sinks,
n bands of b_i bits, m of them above 0:

    C H (sum b_i / n + bits_v) / 8 + 4 C H (m / (n g) + 1 / h) + 2 (W + P) H d + 8 P + 5

and for each row 4 K H (1 + K H) for mean and basis (4 K H (1 + H) where they are not joint; once
for all rows where they are fitted to texts), 2 H for the rotary embedding, and 4 for its length,
num_coded and entry of the block table.
"""

from typing import Literal

from kvq_jax.codecs.affine import Affine
from kvq_jax.codecs.latent import Latent
from kvq_jax.engines.outliers import OutlierTracer, first_tokens
from kvq_jax.engines.window import Window


def svdq(
    *,
    schedule: tuple[int, ...] = (4, 4, 2, 2, 2, 2, 0, 0),
    value_bits: int = 8,
    group_size: int = 128,
    value_group_size: int | None = None,
    residual_length: int = 32,
    joint: bool = True,
    fits: Literal["prompt", "texts"] = "prompt",
    num_sinks: int = 1,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns SVDq.

    Args:
      schedule: bits of the bands of a key's latent channels, the leading one first; as many bands
        as divide head_dim. The mean of it is the bits of a key.
      value_bits: of values.
      group_size: tokens that share a scale, as in `kivi`.
      value_group_size: as in `kivi`.
      residual_length: as in `kivi`.
      joint: take the coordinates of all KV heads together.
      fits: what the coordinates are fitted to: each row's "prompt", or "texts" (`calibrate`).
      num_sinks: first tokens left in full precision; 0 for none, as in the paper.
      tracer: keeps outlier tokens apart, in place of the first ones. It sees keys from before
        rotary embedding.
    """
    return Window(
        key_codec=Latent(schedule, group_size, joint, fits),
        value_codec=Affine(
            value_bits, tile=(1, group_size if value_group_size is None else value_group_size)
        ),
        group_size=group_size,
        residual_length=residual_length,
        pre_rope=True,
        tracer=tracer or first_tokens(num_sinks),
    )
