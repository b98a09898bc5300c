# SPDX-License-Identifier: Apache-2.0
"""What a codec is."""

import abc
from typing import Any

from jaxtyping import Array, Bool, Float

from kvq_jax.base import Code


class Codec(abc.ABC):
    """Stands a small pytree, the code, for a tensor of S tokens by H channels.

    Instances are frozen dataclasses, static under `jax.jit`. Leading axes of the tensor are
    leading axes of every leaf of its code.
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
