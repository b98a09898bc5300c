# SPDX-License-Identifier: Apache-2.0
"""Transform coding: the bits where the loss feels them, of all layers together.

Idea: all heads of a token, before rotary embedding, are one vector. In the principal directions
that covariance and the gradients of the loss have together, a few channels carry nearly all that
matters. Each channel of each layer's keys and values gets 0 to 8 bits of one budget, so that the
loss grows the least; a token needs no scales of its own.

Reference: Staniszewski and Łańcucki, KVTC, arXiv 2511.01815, for the road from principal
directions over bits for each to codes.

Parts: `Planes` codecs of keys from before rotary embedding and of values, fitted to texts; a
`Window` with an `OutlierTracer` whose score is the position.

Differs from the paper: directions and bits are of the metric of the loss's gradients, not of plain
distance; a layer at a time; bits are of single channels, found greedily, and levels are not
entropy coded, so that every token has one size; tokens are coded as they come.

Bytes of a state of one row, C coded slots (capacity less the window, in whole blocks), P_k and P_v
planes of the layer's keys and values (in the mean over all layers at most bits K H), W =
group_size + residual_length, s = num_sinks, d bytes a dense element:

    C (P_k + P_v) / 8 + K (2 (W + s) H d + 8 s + 5) + 2 H

and 4 for its length, num_coded and entry of the block table; and once for all rows, for keys and
for values, of c channels with b bits in all

    4 K H c + 8 K H + 4 c + 4 b
"""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.planes import MOST_BITS, Latents, Planes, find_latents, make_params
from kvq_jax.engines.outliers import first_tokens
from kvq_jax.engines.window import Window
from kvq_jax.fitting.allocation import allocate


@dataclasses.dataclass(frozen=True)
class TransformCoding(Window):
    """See `transform_coding`."""

    key_codec: Planes
    value_codec: Planes
    bits: int | float = 2.25
    value_weight: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.bits <= MOST_BITS:
            raise ValueError(f"bits must be above 0 and at most {MOST_BITS}, got {self.bits}")
        if self.value_weight <= 0:
            raise ValueError(f"value_weight must be above 0, got {self.value_weight}")

    def calibrate(self, keys: Sample, values: Sample) -> tuple[Latents, Latents]:
        """Returns the latent channels of one layer; see `Window.calibrate`."""
        return find_latents(keys), find_latents(values)

    def settle(self, fitted: Sequence[Any], num_heads: int) -> tuple["TransformCoding", list[Any]]:
        """Shares out the bits among the channels of all layers; see `Window.settle`."""
        latents = [channels for layer in fitted for channels in layer[:2]]
        errors = np.stack([x.error for x in latents])
        errors[1::2] *= self.value_weight
        # Without what two marks of a token and rounding up to whole planes of each head can take.
        most = int(self.bits * errors[..., 0].size) - len(latents) * (num_heads + 1)
        if most < 1:
            raise ValueError(f"{self.bits} bits are fewer than marks and rounding alone can take")
        choices = errors.reshape(-1, MOST_BITS + 1)
        bits = allocate(choices, range(MOST_BITS + 1), most / len(choices), "greedy")
        bits = np.asarray(bits).reshape(errors.shape[:2])
        made = [make_params(*x) for x in zip(latents, bits, strict=True)]
        params, sizes = zip(*made, strict=True)
        pairs = zip(params[::2], params[1::2], strict=True)
        return self.with_sizes((sizes[::2], sizes[1::2])), [(*pair, (), ()) for pair in pairs]

    def sizes(self) -> Any:
        """Returns how many channels have each bit, of keys and values; see `Window.sizes`."""
        return [[list(x) for x in codec.sizes] for codec in (self.key_codec, self.value_codec)]

    def with_sizes(self, sizes: Any) -> "TransformCoding":
        """Returns the method of these sizes; see `Window.with_sizes`.

        Raises:
          ValueError: for what `sizes` can't have returned.
        """
        keys, values = _counts(sizes)
        return dataclasses.replace(
            self,
            key_codec=dataclasses.replace(self.key_codec, sizes=keys),
            value_codec=dataclasses.replace(self.value_codec, sizes=values),
        )

    def fitted_parts(self) -> list[str]:
        """Returns what the fit depends on; see `Window.fitted_parts`."""
        plain = dataclasses.replace(self.key_codec, sizes=())
        return [f"{plain} of {self.bits} bits, values {self.value_weight} times"]


def _counts(sizes: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Returns how many channels have each bit as tuples: of keys and values, of each layer."""

    def falls(counts: Any) -> bool:
        return (
            isinstance(counts, list | tuple)
            and len(counts) <= MOST_BITS
            and all(type(n) is int and n > 0 for n in counts)
            and list(counts) == sorted(counts, reverse=True)
        )

    right = isinstance(sizes, list | tuple) and len(sizes) == 2
    right = right and all(isinstance(x, list | tuple) and all(map(falls, x)) for x in sizes)
    if not right or len(sizes[0]) != len(sizes[1]):
        raise ValueError(
            "sizes must be falling counts of channels, for the keys and the values of each layer, "
            f"got {reprlib.repr(sizes)}"
        )
    return tuple(tuple(map(tuple, layers)) for layers in sizes)


def transform_coding(
    *,
    bits: int | float = 2.25,
    value_weight: float = 2.0,
    weighs: bool = True,
    num_sinks: int = 1,
    group_size: int = 32,
    residual_length: int = 32,
) -> TransformCoding:
    """Returns transform coding. Needs `kvq_jax.calibrate`, which fits the method itself as well.

    Args:
      bits: of a key's or value's number, in the mean over all layers; need not be whole.
      value_weight: how much an error of values counts beside one of keys, when bits are shared
        out. What the loss feels of both, to second order, is not the best: 1 was found worse.
      weighs: fit to what the loss feels (gradients), not to distance alone.
      num_sinks: first tokens left in full precision; 0 for none.
      group_size: tokens coded at a time, a multiple of 32.
      residual_length: latest tokens in full precision at the least.
    """
    return TransformCoding(
        key_codec=Planes(weighs),
        value_codec=Planes(weighs),
        group_size=group_size,
        residual_length=residual_length,
        tracer=first_tokens(num_sinks),
        pre_rope=True,
        bits=bits,
        value_weight=value_weight,
    )


def recommended() -> TransformCoding:
    """Returns what predicts best within 2.5 bits at 4096 tokens, window included.

    It is `transform_coding` as it stands, and stays what is best when something better comes.
    """
    return transform_coding()
