# SPDX-License-Identifier: Apache-2.0
"""What a codec is, and what it shares with other parts of a method."""

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvq_jax.base import CacheSpec, Code, Params


class Sample(NamedTuple):
    """What a part is fitted to.

    Attributes:
      x: keys or values, as they enter the cache.
      mask: False for what is padding.
      q: queries that came with them, if they are known.
      gradient: of the loss with respect to each number.
    """

    x: Float[Array, "B T K H"]
    mask: Bool[Array, "B T"]
    q: Float[Array, "B T N H"] | None = None
    gradient: Float[Array, "B T K H"] | None = None

    @property
    def weight(self) -> Float[Array, "B T K H"] | None:
        """What an error of each number counts for: the squared gradient (Fisher)."""
        if self.gradient is None:
            return None
        return jnp.square(self.gradient.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Form:
    """What a fused kernel must know of a codec: kernels serve forms, not classes.

    A code of this form is x ≈ field * scale + minimum, with unsigned fields packed along the tokens
    (`kvq_jax.packing`).

    Attributes:
      bands: (channels, bits) of each band of channels, in order; their channels add up to those
        of a head.
      tile: (tokens, channels) that share a scale and a minimum; None where these are static,
        fitted beforehand for all tokens.
      scale_dtype: of scales and minima.
      row_factor: whether each token has a factor of its own besides.
    """

    bands: tuple[tuple[int, int], ...]
    tile: tuple[int, int] | None
    scale_dtype: jnp.dtype
    row_factor: bool = False

    @property
    def bits(self) -> int | None:
        """The bits of every field; None where bands differ."""
        widths = {bits for _, bits in self.bands}
        return widths.pop() if len(widths) == 1 else None


class Part:
    """A part of a method. What is fitted to data is not in it, but in the state of the cache.

    Instances are frozen dataclasses, static under `jax.jit`. `bind` makes one that can be used
    where it is fitted to something; it is not hashable, and lives no longer than a call.

    Attributes:
      fits: what there is to fit to: each row's "prompt", "texts" beforehand for all rows, or
        nothing.
      weighs: whether texts are to come with gradients.
      use_queries: whether texts are to come with queries, for keys.
    """

    weighs: bool = False
    use_queries: bool = False
    fits: Literal["prompt", "texts"] | None = None

    @property
    def shares_heads(self) -> bool:
        """Whether one thing is fitted to all heads together, so that they can't be parted."""
        return False

    def of_layer[P](self: P, layer: int | None) -> P:
        """Returns the part as one layer has it, where sizes differ from layer to layer."""
        del layer
        return self

    def init(self, spec: CacheSpec) -> Params:
        """Returns what the part is in an empty cache.

        Of what is fitted to texts only shapes are known, with a leading axis of 1; it is NaN.
        """
        del spec
        return ()

    def fit(self, sample: Sample) -> Params:
        """Returns what the part is for each row of a sample."""
        del sample
        return ()

    def bind[P](self: P, params: Params) -> P:
        """Returns the part as fitted."""
        del params
        return self


class Codec(Part, abc.ABC):
    """Stands a small pytree, the code, for a tensor of S tokens by H channels.

    Leading axes of the tensor are leading axes of every leaf of its code. A codec with something
    to fit takes `B K n S H`: of each row and head, n groups of tokens.
    """

    @abc.abstractmethod
    def encode(self, x: Float[Array, "*d S H"], mask: Bool[Array, "*d S"] | None = None) -> Code:
        """Returns the code of x.

        Args:
          x: the tensor.
          mask: False where a token is to become a hole: all zero in the code's scales. None
            keeps every token.
        """

    @abc.abstractmethod
    def decode(self, code: Code, dtype: Any) -> Float[Array, "*d S H"]:
        """Returns the tensor that a code stands for; holes are 0."""

    @abc.abstractmethod
    def mask(self, code: Code) -> Bool[Array, "*d S"]:
        """Returns False where a token is a hole. Needs scales per token."""

    def form(self, num_channels: int) -> Form | None:
        """Returns the form of the code of vectors of so many channels.

        None where it is not one that fused kernels could read.
        """
        del num_channels
        return None
