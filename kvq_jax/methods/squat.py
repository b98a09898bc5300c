# SPDX-License-Identifier: Apache-2.0
"""SQuat: KIVI whose key errors point away from the queries.

Idea: an error of a key that is orthogonal to every query does no harm. So channels are coded a
block after the other, and each block makes up for what the ones before it did to the products
with the prompt's queries. Keys come out less exact, scores more.

Reference: Wang et al., arXiv 2503.24358.

Parts: KIVI's, with a `Feedback` codec of keys that is fitted to the prompt's queries.

Differs from the paper: the queries' second moment is a mean, not a sum, so that its weight does
not grow with the prompt: the default is the paper's at 1000 queries (heads times tokens); keys and
queries are both after rotary embedding; each row has its own queries; a block is half a head where
that is less than 64 channels. What is decoded is what KIVI would decode: kernels don't know.
Without a prompt's queries it is KIVI.

Bytes of a state: KIVI's, and 4 H² for each KV head and row.
"""

from kvq_jax.codecs.feedback import Feedback
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window
from kvq_jax.methods.kivi import kivi_codecs


def squat(
    *,
    bits: int = 2,
    value_bits: int | None = None,
    group_size: int = 32,
    value_group_size: int | None = None,
    residual_length: int = 32,
    rank: int = 20,
    weight: float = 1.0,
    channel_block: int = 64,
    tracer: OutlierTracer | None = None,
) -> Window:
    """Returns SQuat.

    Args:
      bits: as in `kivi`.
      value_bits: as in `kivi`.
      group_size: as in `kivi`.
      value_group_size: as in `kivi`.
      residual_length: as in `kivi`.
      rank: directions of the queries that count; the paper takes 5 to 60.
      weight: of an error that queries see, against one that they don't.
      channel_block: channels that are coded together.
      tracer: keeps outlier tokens apart.
    """
    _, value_codec = kivi_codecs(bits, value_bits, group_size, value_group_size)
    return Window(
        key_codec=Feedback(
            bits, (group_size, 1), channel_block=channel_block, rank=rank, weight=weight
        ),
        value_codec=value_codec,
        group_size=group_size,
        residual_length=residual_length,
        tracer=tracer,
    )
