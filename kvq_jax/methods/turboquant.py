# SPDX-License-Identifier: Apache-2.0
"""TurboQuant: after a random rotation every vector is as good as normal, so its levels are known.

Idea: rotated at random, the channels of any vector of known norm are nearly normal and nearly
independent. So each is coded on its own, by the levels of least square error for a normal
distribution, which need no data, and the norm is kept.

Reference: Zandieh et al., arXiv 2504.19874, algorithm 1 (the variant of least square error).

Parts: `Hadamard` frames with random signs; `Table` codecs with the levels of `lloyd_max` over the
root mean square of a head's token; in a `Window`.

Differs from the paper: the rotation is a Hadamard transform of random signs, which costs
H log H, not a dense random matrix; levels are for the normal distribution, the limit of the
paper's for many channels; all channels have the same bits, where the paper's 2.5 and 3.5 give
outlier channels one more; the unbiased variant, with a bit a channel for the residual, is left
out. Tokens are coded a group at a time, and are in full precision until then.

Bytes of a state of one KV head and row, g = group_size, d bytes a dense element, C coded slots
(capacity less the window, in whole blocks), W = g + residual_length:

    C H (bits_k + bits_v) / 8 + 4 C + 2 W H d

and 4 for each row's length, num_coded and entry of the block table.
"""

from kvq_jax.codecs.frames import Hadamard
from kvq_jax.codecs.levels import lloyd_max
from kvq_jax.codecs.table import Table
from kvq_jax.codecs.tiled import WHOLE_HEAD
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window


def turboquant(
    *,
    bits: int = 4,
    value_bits: int | None = None,
    group_size: int = 32,
    residual_length: int = 0,
    seed: int = 0,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns TurboQuant.

    Args:
      bits: of keys, and of values unless those have their own; 1 to 8.
      value_bits: of values.
      group_size: tokens coded at a time, a multiple of 32.
      residual_length: latest tokens in full precision at the least; the paper has none.
      seed: of the rotation.
      tracer: keeps outlier tokens apart. It sees rotated keys, whose "l2" is that of the keys.
    """
    key_codec, value_codec = (
        Table(b, tile=(1, WHOLE_HEAD), levels=lloyd_max(b), size="rms")
        for b in (bits, bits if value_bits is None else value_bits)
    )
    return Window(
        key_codec=key_codec,
        value_codec=value_codec,
        group_size=group_size,
        residual_length=residual_length,
        key_frame=Hadamard(seed),
        value_frame=Hadamard(seed),
        tracer=tracer,
    )
