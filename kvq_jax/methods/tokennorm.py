# SPDX-License-Identifier: Apache-2.0
"""OScaR: keys rotated and divided by their norm, then coded per channel.

Idea: where tokens of one channel share a scale, a few of small norm (attention sinks) take
most of the damage: what is a small error for the others is large for them. A rotation spreads the
large channels over all, and dividing each token by its norm makes all tokens alike.

Reference: Su et al., arXiv 2605.19660 (Omni-Scaled Canalized Rotation). Named for what it does:
OSCAR, arXiv 2605.17757, is another method.

Parts: `Hadamard` frames; KIVI's codecs, that of the keys in a `Normalized` with a factor for each
token; a `Window`.

Differs from the paper: the norm is stored as root mean square, in float16; keys and values are
coded together, a group at a time.

Bytes of a state: KIVI's, and 2 C for each KV head and row: a factor of each coded slot.
"""

from kvq_jax.codecs.frames import Hadamard
from kvq_jax.codecs.normalized import Normalized
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window
from kvq_jax.methods.kivi import kivi_codecs


def tokennorm(
    *,
    bits: int = 2,
    value_bits: int | None = None,
    group_size: int = 128,
    value_group_size: int | None = None,
    residual_length: int = 128,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns OScaR.

    Args:
      bits: as in `kivi`.
      value_bits: as in `kivi`.
      group_size: as in `kivi`.
      value_group_size: as in `kivi`.
      residual_length: as in `kivi`.
      tracer: keeps outlier tokens apart. It sees rotated keys, whose "l2" is that of the keys.
    """
    key_codec, value_codec = kivi_codecs(bits, value_bits, group_size, value_group_size)
    return Window(
        key_codec=Normalized(key_codec, "token"),
        value_codec=value_codec,
        group_size=group_size,
        residual_length=residual_length,
        key_frame=Hadamard(),
        value_frame=Hadamard(),
        tracer=tracer,
    )
