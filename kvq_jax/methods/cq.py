# SPDX-License-Identifier: Apache-2.0
"""CQ, Coupled Quantization: neighbouring channels of a token share one code.

Idea: channels of a key or value depend on each other, so that a few together have less entropy
than each alone. Groups of channels are coded by the nearest of learned centroids, down to
one bit a channel.

Reference: Zhang et al., arXiv 2405.03917.

Parts: `Vector` codecs of values and of keys from before rotary embedding, fitted to texts, in a
`Window` with an `OutlierTracer` whose score is the position.

Differs from the paper, or fills its silences: tokens are coded a group at a time, and are in full
precision until then; k-means takes 20 iterations; weights have a floor; the first token,
to which no centroids are fitted and which attention rests on, is left alone.

Bytes of a state of one KV head and row, c = channels of b = bits, d bytes a dense element, C coded
slots (capacity less the window, in whole blocks), W = group_size + residual_length, P = num_sinks:

    2 C (H / c b + 2) / 8 + 2 (W + P) H d + 8 P + 5

and for each row 2 H for the rotary embedding, and 4 for its length, num_coded and entry of the
block table; and once for all rows 4 K H 2^b for centroids.
"""

from kvq_jax.codecs.vector import Vector
from kvq_jax.engines.outliers import OutlierTracer, first_tokens
from kvq_jax.engines.window import Window


def cq(
    *,
    channels: int = 4,
    bits: int = 8,
    weighs: bool = True,
    iterations: int = 20,
    num_sinks: int = 1,
    group_size: int = 32,
    residual_length: int = 0,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns CQ, by default the paper's 4c8b: 2 bits a number. Needs `kvq_jax.calibrate`.

    Args:
      channels: that share a code, a divisor of head_dim; 2, 4 or 8 in the paper.
      bits: of a code, 1 to 10; 8 and 10 in the paper.
      weighs: centroids by squared gradients of the loss (Fisher), not by distance alone.
      iterations: of k-means.
      num_sinks: first tokens left in full precision; 0 for none, as in the paper.
      group_size: tokens coded at a time, a multiple of 32.
      residual_length: latest tokens in full precision at the least; 0 or 128 in the paper.
      tracer: keeps outlier tokens apart, in place of the first ones. It sees keys from before
        rotary embedding.
    """
    codec = Vector(channels, bits, weighs, iterations)
    return Window(
        key_codec=codec,
        value_codec=codec,
        group_size=group_size,
        residual_length=residual_length,
        pre_rope=True,
        tracer=tracer or first_tokens(num_sinks),
    )
