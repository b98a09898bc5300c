# SPDX-License-Identifier: Apache-2.0
"""What all caches share that attention reads as a dense and maybe a coded segment."""

import abc
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CacheTransform, CodedSegment, Implementation, RingKV, State
from kvq_jax.codecs.base import Codec
from kvq_jax.codecs.frames import AS_GIVEN, Frame
from kvq_jax.kernels.decode_attention import decode_attention, plain
from kvq_jax.kernels.decode_attention.api import check_queries, concatenate


class Segments(NamedTuple):
    """Where the tokens of a state are.

    Attributes:
      dense: those kept as they are.
      coded: those kept as codes; None for none at all.
      key_codec: of the coded keys.
      value_codec: of the coded values.
      key_frame: that all keys are in, dense or coded.
      value_frame: that all values are in.
      rope: of keys from before rotary embedding, radians per token; see `decode_attention`.
    """

    dense: RingKV
    coded: CodedSegment | None = None
    key_codec: Codec | None = None
    value_codec: Codec | None = None
    key_frame: Frame = AS_GIVEN
    value_frame: Frame = AS_GIVEN
    rope: Float[Array, "B half"] | None = None


class SegmentedCache(CacheTransform):
    """A `CacheTransform` by two functions: how tokens are added, and where they are then."""

    @abc.abstractmethod
    def extend(self, state: State, k: Array, v: Array, lengths: Array | None) -> State:
        """Adds the first `lengths` tokens of each row of k and v `B T K H`; None means all."""

    @abc.abstractmethod
    def segments(self, state: State) -> Segments:
        """Returns where the tokens are."""

    def prefill(
        self,
        state: State,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        q: Float[Array, "B T N H"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> State:
        """Adds a right-padded batch of prompts; see `CacheTransform.prefill`."""
        del q
        return self.extend(state, k, v, lengths)

    def append(self, state: State, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> State:
        """Adds T tokens to every row; see `CacheTransform.append`."""
        return self.extend(state, k, v, None)

    def attend(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention output of the last T tokens; see `CacheTransform.attend`."""
        x = self.segments(state)
        check_queries(q, x.dense.keys)
        out = decode_attention(
            x.key_frame.absorb(q),
            state.length,
            x.dense,
            x.coded,
            key_codec=x.key_codec,
            value_codec=x.value_codec,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            capacity=self.capacity(state),
            rope=x.rope,
            implementation=implementation,
        )
        return x.value_frame.leave(out)

    def read(self, state: State) -> KV:
        """Returns all tokens dense; see `CacheTransform.read`."""
        x = self.segments(state)
        parts = [x.dense.located(state.length)]
        if x.coded is not None and x.key_codec is not None and x.value_codec is not None:
            parts.insert(0, plain.read(x.coded, x.key_codec, x.value_codec, x.dense.keys.dtype))
        keys, values, positions = plain.turned(concatenate(*parts), x.rope)
        return KV(x.key_frame.leave(keys), x.value_frame.leave(values), positions)
