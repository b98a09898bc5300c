# SPDX-License-Identifier: Apache-2.0
"""KVarN: rotated, then variances of tokens and channels evened out, then coded.

Idea: errors that add up over a long generation come from tokens that are decoded too large or
too small. A rotation spreads outlier channels; then the deviations of the tokens and of the
channels of a group are divided out in turn until both are even. What is left is coded per
channel (keys) or per token (values), and the other axis keeps its factors.

Reference: Müller et al., arXiv 2606.03458.

Parts: `Hadamard` frames, `Affine` codecs in `Normalized` ones, a `Window`.

Differs from the paper: 4 rounds of division, after which the deviations of real keys are within
half a percent, where its code runs 16 and takes the best; its code also bounds each factor.
The factors of the axis that the codes have scales for anyway are not stored: the scales hold them.
No first tokens are kept exact; that is what a tracer is for.

Bytes of a state: KIVI's, and for each KV head and row 2 C (1 + H / g): factors of each coded
slot's key, and of each channel of each group's values.
"""

from kvq_jax.codecs.frames import Hadamard
from kvq_jax.codecs.normalized import Normalized
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window
from kvq_jax.methods.kivi import kivi_codecs

_ROUNDS = 4


def kvarn(
    *,
    bits: int = 4,
    value_bits: int | None = None,
    group_size: int = 128,
    value_group_size: int | None = None,
    residual_length: int = 0,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns KVarN.

    Args:
      bits: of keys; 1 to 8.
      value_bits: of values; None takes half the bits of keys, as the paper's code does.
      group_size: tokens that are evened out and coded together, as in `kivi`.
      value_group_size: as in `kivi`.
      residual_length: latest tokens in full precision at the least.
      tracer: keeps outlier tokens apart. It sees rotated keys, whose "l2" is that of the keys.
    """
    value_bits = max(1, bits // 2) if value_bits is None else value_bits
    key_codec, value_codec = kivi_codecs(bits, value_bits, group_size, value_group_size)
    return Window(
        key_codec=Normalized(key_codec, "token", _ROUNDS),
        value_codec=Normalized(value_codec, "channel", _ROUNDS),
        group_size=group_size,
        residual_length=residual_length,
        key_frame=Hadamard(),
        value_frame=Hadamard(),
        tracer=tracer,
    )
