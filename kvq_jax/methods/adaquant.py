# SPDX-License-Identifier: Apache-2.0
"""KV-AdaQuant: more bits for keys than for values, and for some layers than for others.

Idea: keys have larger norms than values, and errors in them do more harm. Of a budget of bits
keys get more; which layers get how many, the norms of their projections say, or errors
that are measured.

Reference: Hariri et al., arXiv 2502.15075.

Parts: KIVI's codecs and window; where layers differ, one for each pair of widths in a `Layered`.
`kvq_jax.fitting.allocation` and `.costs` find the widths.

Differs from the paper: codes are KIVI's, keys per channel, where the paper takes HQQ or Quanto and
codes the whole cache anew now and then; all groups have one size. With keys per channel
more bits for keys than for values gain less than the paper finds.

Bytes of a state: KIVI's, with the layer's bits.
"""

from kvq_jax.base import CacheTransform
from kvq_jax.engines.layered import Layered, unique_with_index
from kvq_jax.engines.outliers import OutlierTracer
from kvq_jax.engines.window import Window
from kvq_jax.methods.kivi import kivi


def adaquant(
    *,
    bits: int | tuple[int, ...] = 4,
    value_bits: int | tuple[int, ...] = 2,
    group_size: int = 64,
    value_group_size: int | None = None,
    residual_length: int = 64,
    tracer: OutlierTracer | None = None,
) -> CacheTransform:
    """Returns KV-AdaQuant, by default with 4 bits for keys and 2 for values everywhere.

    Args:
      bits: of keys, or those of each layer's keys.
      value_bits: of values, likewise.
      group_size: as in `kivi`.
      value_group_size: as in `kivi`.
      residual_length: as in `kivi`.
      tracer: keeps outlier tokens apart.
    """

    def method(bits: int, value_bits: int) -> Window:
        return kivi(
            bits=bits,
            value_bits=value_bits,
            group_size=group_size,
            value_group_size=value_group_size,
            residual_length=residual_length,
            tracer=tracer,
        )

    if isinstance(bits, int) and isinstance(value_bits, int):
        return method(bits, value_bits)
    if isinstance(bits, int) or isinstance(value_bits, int):
        raise ValueError(f"bits must be of all layers or of each, got {bits} and {value_bits}")
    pairs, kinds = unique_with_index(list(zip(bits, value_bits, strict=True)))
    return Layered(tuple(method(*pair) for pair in pairs), kinds)
