# SPDX-License-Identifier: Apache-2.0
"""KIVI with the first tokens kept: the control that shows what tracing adds.

Idea: attention rests on the first tokens of a sequence, and these are also most of OTT's
outliers. Keeping them needs no tracing.

Reference: attention sinks, Xiao et al., arXiv 2309.17453; as a baseline of OTT's.

Parts: KIVI's codecs and window, and an `OutlierTracer` whose score is the position.

Differs from the paper: none; it evicts tokens, this codes them.

Bytes of a state: OTT's with P = num_sinks and A = 0.
"""

from kvq_jax.engines.outliers import first_tokens
from kvq_jax.engines.window import Window
from kvq_jax.methods.kivi import kivi


def sink(
    *,
    bits: int = 2,
    value_bits: int | None = None,
    group_size: int = 128,
    value_group_size: int | None = None,
    residual_length: int = 32,
    num_sinks: int = 4,
) -> Window:
    """Returns KIVI with the first `num_sinks` tokens in full precision; see `kivi`."""
    return kivi(
        bits=bits,
        value_bits=value_bits,
        group_size=group_size,
        value_group_size=value_group_size,
        residual_length=residual_length,
        tracer=first_tokens(num_sinks),
    )
