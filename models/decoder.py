# SPDX-License-Identifier: Apache-2.0
"""Decoder-only transformer of the Llama family, in Flax."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvq_jax.base import CacheSpec, CacheTransform, Params
from kvq_jax.models.attention import Attention
from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.layers import MLP, RMSNorm, matmul_precision, rope_frequencies

States = tuple[Any, ...]


class Layer(nnx.Module):
    """Pre-norm residual layer: attention, then MLP."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        state: Any,
        cache: CacheTransform,
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Runs T tokens after those the cache holds; see `Attention`."""
        out, state = self.attention(self.attention_norm(x), positions, state, cache)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), state

    def prefill(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        state: Any,
        cache: CacheTransform,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Runs a right-padded batch of prompts on an empty cache; see `Attention.prefill`."""
        normed = self.attention_norm(x)
        out, state = self.attention.prefill(normed, positions, state, cache, lengths)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), state


class Decoder(nnx.Module):
    """Token ids to hidden states, with the keys and values kept by a cache transform.

    Layers are separate modules in a Python loop and each has its own cache state: a scan over
    stacked weights makes XLA:CPU copy every layer's weights in every step.

    A decoder is a pytree and may be passed to `jax.jit`; but JAX takes it apart anew in each
    call, 4 ms for 30 layers. A loop over single steps should do it once:

        leaves, treedef = jax.tree.flatten(decoder)

        @jax.jit
        def step(leaves, tokens, states):
            return jax.tree.unflatten(treedef, leaves)(tokens, states, cache)

    Attributes:
      config: the sizes.
      dtype: of weights and activations; norms, rope and softmax compute in float32.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """Makes a decoder with random weights.

        Args:
          config: the sizes.
          dtype: floating dtype of weights and activations.
          rngs: random streams of the initializers.
        """
        dtype = jnp.dtype(dtype)
        init = nnx.initializers.normal(config.width**-0.5)
        table_shape = (config.vocab_size, config.width)
        self.config = config
        self.dtype = dtype
        self.embedding = nnx.Param(init(rngs.params(), table_shape, dtype))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(init(rngs.params(), table_shape, dtype))
        self.layers = nnx.List(
            [Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps, dtype=dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        states: States,
        cache: CacheTransform,
        *,
        run_layer: Callable = Layer.__call__,
    ) -> tuple[Float[Array, "B T M"], States]:
        """Runs T tokens after those the cache holds: a decode step, or a chunk of a prompt.

        Args:
          tokens: the next T tokens of every row. Under jit, an id outside the vocabulary gives
            NaN; outside, it is refused.
          states: one cache state a layer, as `init_states` or `prefill` returned them.
          cache: the transform the states belong to; static under jit.
          run_layer: `Layer.__call__`, or that jitted: outside of `jax.jit` it compiles once for
            all layers, and costs a dispatch each.

        Returns:
          Hidden states of the T tokens, to be given to `logits`, and the new states.

        Raises:
          ValueError: a token id is not in the vocabulary (outside of `jax.jit`).
        """
        positions = states[0].length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = self._embed(tokens)
        states, cache = cache.make_room(states, tokens.shape[1])
        new_states = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = run_layer(layer, x, positions, state, cache)
            new_states.append(state)
        return self.norm(x), tuple(new_states)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        states: States,
        cache: CacheTransform,
        *,
        lengths: Int[Array, " B"] | None = None,
        run_layer: Callable = Layer.prefill,
    ) -> tuple[Float[Array, "B T M"], States]:
        """Runs a whole prompt with exact attention and fills empty states with it.

        Args:
          tokens: prompts, right-padded with anything; wrong ids are treated as in `__call__`.
          states: empty states, as `init_states` returns them.
          cache: the transform the states belong to; static under jit.
          lengths: valid tokens of each row; None means all T.
          run_layer: `Layer.prefill`, or that jitted; see `__call__`.

        Returns:
          Hidden states and the new states. Hidden states of padding mean nothing; the last of
          row b is `hidden[b, lengths[b] - 1]`.

        Raises:
          ValueError: a token id is not in the vocabulary (outside of `jax.jit`).
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if lengths is not None:
            # Any valid id will do; an invalid one is NaN, which no mask removes from a sum.
            tokens = jnp.where(positions < lengths[:, None], tokens, jnp.zeros_like(tokens))
        x = self._embed(tokens)
        new_states = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = run_layer(layer, x, positions, state, cache, lengths)
            new_states.append(state)
        return self.norm(x), tuple(new_states)

    def logits(self, hidden: Float[Array, "*batch M"]) -> Float[Array, "*batch V"]:
        """Unembeds hidden states of the positions the caller needs; float32."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        return jnp.einsum(
            "...m,vm->...v",
            hidden,
            table[...],
            precision=matmul_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        tokens, vocab_size = jnp.asarray(tokens), self.config.vocab_size
        if not isinstance(tokens, jax.core.Tracer) and tokens.is_fully_addressable:
            wrong = np.argwhere((np.asarray(tokens) < 0) | (np.asarray(tokens) >= vocab_size))
            if wrong.size:
                row, column = wrong[0].tolist()
                raise ValueError(
                    f"token id {tokens[row, column]} in row {row} is not in 0 to {vocab_size - 1}"
                )
        # Plain indexing would silently clamp an id that is too large to the last one; this mode
        # gives NaN, but still counts a negative one from the end.
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return jnp.where((tokens >= 0)[..., None], x, jnp.asarray(jnp.nan, x.dtype))


def init_states(
    config: DecoderConfig,
    cache: CacheTransform,
    batch_size: int,
    capacity: int,
    dtype: Any = jnp.float32,
    params: Sequence[Params] | None = None,
) -> States:
    """Makes one empty cache state a layer.

    Args:
      config: of the decoder.
      cache: the transform.
      batch_size: B, number of rows.
      capacity: S, tokens a row can hold.
      dtype: of the keys and values the decoder will append.
      params: of each layer, for a transform that needs texts; see `CacheTransform.with_params`.

    Returns:
      A tuple of L states.

    Raises:
      ValueError: for a transform of another number of layers.
    """
    # Only a transform that treats each layer by a method of its own has a number of layers.
    num_layers = getattr(cache, "num_layers", config.num_layers)
    if num_layers != config.num_layers:
        raise ValueError(
            f"the method is for {num_layers} layers, the model has {config.num_layers}: "
            "give as many bits as the model has layers"
        )
    spec = cache_spec(config, cache, batch_size, capacity, dtype)
    states = (cache.init(spec, layer=layer) for layer in range(config.num_layers))
    if params is None:
        return tuple(states)
    return tuple(cache.with_params(*x) for x in zip(states, params, strict=True))


def cache_spec(
    config: DecoderConfig,
    cache: CacheTransform,
    batch_size: int,
    capacity: int,
    dtype: Any = jnp.float32,
) -> CacheSpec:
    """Returns the shape of each layer's cache; see `init_states`."""
    return CacheSpec(
        batch_size=batch_size,
        num_kv_heads=config.num_kv_heads,
        capacity=capacity,
        head_dim=config.head_dim,
        dtype=jnp.dtype(dtype),
        rope=tuple(rope_frequencies(config).tolist()) if cache.pre_rope else None,
    )
