# SPDX-License-Identifier: Apache-2.0
"""KVQuant: learned levels, keys before rotary embedding, one number in a hundred kept apart.

Idea: before rotary embedding the channels of keys have ranges that texts tell in advance; values
have a range for each token. Within it one table of learned levels serves all. The hundredth of
the numbers that lie outside are stored besides, and the first token, which attention rests on, is
left alone.

Reference: Hooper et al., arXiv 2401.18079.

Parts: `Nonuniform` codecs fitted to texts, per channel (keys from before rotary embedding) and per
token (values), in a `Window` with an `OutlierTracer` whose score is the position.

Differs from the paper: outliers are a fixed number for each KV head of a token, where the paper
takes what exceeds a threshold, or a fixed number of all heads together; what is stored of one is
its error; a token's range is that of one head; tokens are coded a group at a time, and are in
full precision until then.

Bytes of a state of one KV head and row, n = max(1, round(outliers H)) (or 0), d bytes a dense
element, C coded slots (capacity less the window, in whole blocks), W = group_size +
residual_length, P = num_sinks:

    C H (bits_k + bits_v) / 8 + 6 C n + 4 C + 2 (W + P) H d + 8 P + 5

and for each row 2 H for the rotary embedding, and 4 for its length, num_coded and entry of the
block table; and once for all rows 8 K H + 4 (2^bits_k + 2^bits_v) for ranges and levels.
"""

from kvq_jax.codecs.nonuniform import Nonuniform
from kvq_jax.engines.outliers import OutlierTracer, first_tokens
from kvq_jax.engines.window import Window


def kvquant(
    *,
    bits: int = 3,
    value_bits: int | None = None,
    outliers: float = 0.01,
    weighs: bool = True,
    keep_deviation: bool | None = None,
    num_sinks: int = 1,
    group_size: int = 32,
    residual_length: int = 0,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns KVQuant. Needs `kvq_jax.calibrate`.

    Args:
      bits: of keys, and of values unless those have their own; 2 to 4 in the paper.
      value_bits: of values.
      outliers: share of the numbers that are kept apart; 0 for none.
      weighs: levels by squared gradients of the loss (Fisher), not by distance alone.
      keep_deviation: the paper's Q-Norm; None takes it for 2 bits, as the paper does.
      num_sinks: first tokens left in full precision; 0 for none.
      group_size: tokens coded at a time, a multiple of 32.
      residual_length: latest tokens in full precision at the least; the paper has none.
      tracer: keeps outlier tokens apart, in place of the first ones.
    """
    value_bits = bits if value_bits is None else value_bits
    keep, keep_values = (
        b == 2 if keep_deviation is None else keep_deviation for b in (bits, value_bits)
    )
    return Window(
        key_codec=Nonuniform(bits, "channel", outliers, weighs, keep),
        value_codec=Nonuniform(value_bits, "token", outliers, weighs, keep_values),
        group_size=group_size,
        residual_length=residual_length,
        pre_rope=True,
        tracer=tracer or first_tokens(num_sinks),
    )
