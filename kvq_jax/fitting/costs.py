# SPDX-License-Identifier: Apache-2.0
"""What quantizing each layer's keys and values costs, for `allocation.allocate`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvq_jax.codecs.base import Codec
from kvq_jax.fitting.record import record
from kvq_jax.methods import kivi
from kvq_jax.models import Decoder


def norm_costs(decoder: Decoder, bits: Sequence[int]) -> Float[np.ndarray, "L 2 choices"]:
    """Returns the cost of each number of bits by the norms of a layer's projections.

    It is the squared Frobenius norm of the key or value projection over 4**bits, as in KV-AdaQuant,
    and needs no data.
    """
    norms = [
        [jnp.linalg.norm(projection.kernel[...]) for projection in (x.k_proj, x.v_proj)]
        for x in (layer.attention for layer in decoder.layers)
    ]
    return np.square(np.asarray(norms))[..., None] * 0.25 ** np.asarray(bits, float)


def measured_costs(
    decoder: Decoder, windows: Int[np.ndarray, "n T"], bits: Sequence[int], group_size: int = 32
) -> Float[np.ndarray, "L 2 choices"]:
    """Returns the cost of each number of bits by the errors of a layer's keys and values.

    It is the sum of squared errors, each times the squared gradient of the loss with respect to
    that number: what independent errors add to the loss, to second order.

    Args:
      decoder: the model.
      windows: token ids, with a window of text in each row, of whole groups.
      bits: the choices.
      group_size: tokens that share a scale.
    """
    costs = np.zeros((len(decoder.layers), 2, len(bits)))
    for window in windows:
        recorded = record(decoder, jnp.asarray(window)[None], pre_rope=False, gradients=True)
        for layer, one in enumerate(recorded):
            for i, number in enumerate(bits):
                method = kivi(bits=number, value_bits=number, group_size=group_size)
                for j, (x, slope, codec) in enumerate(
                    (
                        (one.keys, one.key_gradient, method.key_codec),
                        (one.values, one.value_gradient, method.value_codec),
                    )
                ):
                    assert slope is not None
                    costs[layer, j, i] += _error(x, slope, group_size, codec)
    return costs


def _error(x: jax.Array, slope: jax.Array, group_size: int, codec: Codec) -> float:
    x, slope = (y.reshape(*y.shape[:2], -1, group_size, y.shape[-1]) for y in (x, slope))
    error = codec.decode(codec.encode(x), jnp.float32) - x
    return float(jnp.square(slope * error).sum())
