# SPDX-License-Identifier: Apache-2.0
"""Decode attention on TPUs: codes become operands of the matrix unit by a shift and two masks.

Scores. A field of 2 bits is spliced into the mantissa of a float8_e5m2, one of 4 bits into that of
a bfloat16: 1 + field / 4 or 1 + field / 16, which the matrix unit takes as they are. So nothing is
converted. The scale of the channel goes into the query, once per group of tokens, and one sum
beside the scores makes up for the minima, for the 1, and for the rounding of that query.

Output. The scale of a token goes into its weight, its minimum into a sum beside the output.

Registers have 8 rows. Where a KV head has fewer queries than that, the rows are shared out among
several tiles of tokens, each with its own running softmax, and merged in the end.

A token without a value (scale 0) is a hole and gets no weight.
"""

from kvq_jax.kernels.decode_attention.mosaic_tpu.launch import decode_attention, reason_against

__all__ = ["decode_attention", "reason_against"]
