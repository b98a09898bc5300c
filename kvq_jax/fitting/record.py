# SPDX-License-Identifier: Apache-2.0
"""Recording what each layer's cache is given while a model reads a text."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CacheSpec, Implementation, State
from kvq_jax.kernels.decode_attention import plain
from kvq_jax.methods.dense import Dense
from kvq_jax.models import Decoder, Layer, init_states
from kvq_jax.models.layers import apply_rope, rope_frequencies


class Recording(NamedTuple):
    """What one layer's cache is given for a window of text.

    Attributes:
      keys: keys.
      values: values.
      queries: queries; None unless they were asked for.
      key_gradient: gradient of the loss with respect to the keys; None unless asked for.
      value_gradient: the same for the values.
    """

    keys: Float[Array, "1 K T H"]
    values: Float[Array, "1 K T H"]
    queries: Float[Array, "1 N T H"] | None = None
    key_gradient: Float[Array, "1 K T H"] | None = None
    value_gradient: Float[Array, "1 K T H"] | None = None


class _Recorded(NamedTuple):
    """The state of a `_Recorder`.

    Attributes:
      keys: keys, with the perturbation added.
      values: values, with the perturbation added.
      added: the perturbation of keys and values, which is zero.
      length: tokens of each row.
      queries: set by `_record_layer` if queries are recorded.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    added: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
    length: Int[Array, " B"]
    queries: Float[Array, "B T N H"] | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class _Recorder(Dense):
    """A dense cache that adds a zero perturbation to keys and values older than the exact window.

    The gradient with respect to the perturbation is the gradient with respect to *cached* keys
    and values.

    Args:
      exact: a query sees this many latest tokens, its own included, without the perturbation.
      rope: radians per token of the model's rotary embedding, to record keys from before it.
      queries: record queries too.
      seen: where `attend` leaves its queries; see `_record_layer`.
    """

    exact: int = 0
    rope: tuple[float, ...] | None = None
    queries: bool = False
    seen: list[Array] | None = dataclasses.field(default=None, compare=False, repr=False)
    pre_rope: bool = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "pre_rope", self.rope is not None)

    def init(self, spec: CacheSpec, layer: int | None = None) -> State:
        """Returns an empty cache whose perturbation is zero."""
        zeros = super().init(spec, layer)
        return _Recorded(zeros.keys, zeros.values, (zeros.keys, zeros.values), zeros.length)

    def extend(self, state: State, k: Array, v: Array, lengths: Array | None) -> State:
        """Takes the keys and values of a whole window."""
        del lengths
        added_k, added_v = state.added
        k, v = (x.swapaxes(1, 2) for x in (k, v))
        return state._replace(
            keys=k + added_k, values=v + added_v, length=state.length + k.shape[2]
        )

    def attend(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attends with and without the perturbation, and takes what each query is to see."""
        del implementation
        if self.seen is not None:
            self.seen.append(q)
        batch, num_tokens, _, head_dim = q.shape
        at = jnp.arange(num_tokens, dtype=jnp.int32)
        distance = at[:, None] - at
        near = distance < self.exact
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        scale = head_dim**-0.5 if sm_scale is None else sm_scale
        rope = None if self.rope is None else jnp.asarray(self.rope)[None]
        moved = KV(state.keys, state.values, at[None, None])
        added_k, added_v = state.added
        exact = KV(state.keys - added_k, state.values - added_v, at[None, None])
        moved, exact = (plain.turned(x, rope) for x in (moved, exact))
        q = q.reshape(batch, num_tokens, moved.keys.shape[1], -1, head_dim)
        with jax.default_matmul_precision("highest"):
            scores = jnp.where(
                near, *(jnp.einsum("btkgh,bksh->bkgts", q, x.keys) for x in (exact, moved))
            )
            scores = jnp.where(visible, scores.astype(jnp.float32) * scale, -jnp.inf)
            weights = jax.nn.softmax(scores).astype(q.dtype)
            out, far_out = (
                jnp.einsum("bkgts,bksh->btkgh", jnp.where(mask, weights, 0), x.values)
                for mask, x in ((near, exact), (~near, moved))
            )
            out += far_out
        return out.reshape(batch, num_tokens, -1, head_dim)


def _record_layer(
    layer: Layer, x: Array, positions: Array, state: _Recorded, recorder: _Recorder
) -> tuple[Array, _Recorded]:
    """Runs a layer. `attend` returns no state, so queries reach it by way of `seen`."""
    if not recorder.queries:
        return layer(x, positions, state, recorder)
    seen: list[Array] = []
    x, state = layer(x, positions, state, dataclasses.replace(recorder, seen=seen))
    return x, state._replace(queries=seen[0])


# One compilation serves all layers, and the backward pass recomputes a layer's activations
# instead of keeping those of all layers.
_run_layer = jax.jit(jax.checkpoint(_record_layer, static_argnums=4), static_argnums=4)


def record(
    decoder: Decoder,
    tokens: Int[Array, "1 T"],
    *,
    pre_rope: bool,
    gradients: bool,
    queries: bool = False,
    exact: int = 0,
) -> list[Recording]:
    """Returns what each layer's cache is given for a window of text.

    Args:
      decoder: the model.
      tokens: the window.
      pre_rope: record keys and queries from before rotary embedding.
      gradients: record the gradients of the loss with respect to keys and values.
      queries: record queries.
      exact: leave out of the gradients what a query sees in this many latest tokens, its own
        included.
    """
    config = decoder.config
    frequencies = rope_frequencies(config)
    rope = tuple(frequencies.tolist()) if pre_rope else None
    recorder = _Recorder(exact, rope, queries)
    empty = init_states(config, recorder, 1, tokens.shape[1], decoder.dtype)

    def loss(zeros: list[tuple[Array, Array]]):
        start = tuple(x._replace(added=added) for x, added in zip(empty, zeros, strict=True))
        hidden, states = decoder(tokens, start, recorder, run_layer=_run_layer)
        if not gradients:
            return jnp.zeros(()), states
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).sum(), states

    zeros = [state.added for state in empty]
    if gradients:
        (_, states), slopes = jax.value_and_grad(loss, has_aux=True)(zeros)
    else:
        states, slopes = loss(zeros)[1], [(None, None)] * len(zeros)
    recorded = [Recording(state.keys, state.values, None, *slope)
                for state, slope in zip(states, slopes, strict=True)]  # fmt: skip
    if not queries:
        return recorded
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    def before_rope(q: Array) -> Array:
        """Turns queries back, since a model gives them to a cache after rotary embedding."""
        return apply_rope(q, positions, -frequencies) if pre_rope else q

    return [
        one._replace(queries=before_rope(state.queries).swapaxes(1, 2))
        for one, state in zip(recorded, states, strict=True)
    ]
