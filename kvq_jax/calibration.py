# SPDX-License-Identifier: Apache-2.0
"""Fitting methods to texts, once for all prompts."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvq_jax.base import CacheTransform, Implementation, Params
from kvq_jax.codecs.base import Sample
from kvq_jax.engines import Segments, Window
from kvq_jax.methods.dense import Dense, DenseState
from kvq_jax.models import Decoder, DecoderConfig, Layer, LoadedModel, init_states
from kvq_jax.models.layers import rope_frequencies


class Calibration(NamedTuple):
    """What `calibrate` returns.

    Attributes:
      params: of each layer, for `CacheTransform.with_params`.
      about: what they were fitted for and on: method, sizes of the model, digest of the texts.
    """

    params: tuple[Params, ...]
    about: dict[str, Any]


def calibrate(
    model: LoadedModel | Decoder,
    texts: Sequence[str] | Int[np.ndarray, "n T"],
    method: CacheTransform,
    *,
    context: int = 512,
    num_tokens: int = 8192,
    skip_first: int = 1,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Fits a method to the keys and values that texts have in a model.

    Texts go through the model one window after another. Of each, keys, values and, if the method
    asks for them, squared gradients of the loss with respect to both are kept at random
    positions, `num_tokens` in all: that much host memory is needed, whatever the length of the
    texts.

    Args:
      model: from `kvq_jax.models.load`; or a bare decoder, which takes token ids.
      texts: texts, each cut into windows and what is left of it dropped; or token ids, a window a
        row.
      method: one with `needs_texts`.
      context: tokens of a window of text.
      num_tokens: tokens to fit to.
      skip_first: tokens at the start of each window that are left out: attention sinks, whose
        keys are unlike all others.
      seed: of the positions.
      on_progress: called with (what is done, how often, out of how many).

    Raises:
      ValueError: for a method that fits nothing to texts, and texts shorter than a window.
    """
    method = _needing_texts(method)
    decoder = model.decoder if isinstance(model, LoadedModel) else model
    windows = _windows(model, texts, context)
    count, length = windows.shape
    share = min(-(-num_tokens // count), length - skip_first)
    rng = np.random.default_rng(seed)
    samples: list[list[tuple[np.ndarray, ...]]] = [[] for _ in decoder.layers]
    for i, window in enumerate(windows):
        at = np.sort(rng.choice(np.arange(skip_first, length), share, replace=False))
        recorded = record(decoder, jnp.asarray(window)[None], method.pre_rope, method.needs_weights)
        for layer, arrays in zip(samples, recorded, strict=True):
            layer.append(tuple(np.asarray(x)[0][:, at].swapaxes(0, 1) for x in arrays))
        if on_progress:
            on_progress("reading", i + 1, count)
    params = []
    for i, layer in enumerate(samples):
        k, v, *weights = (jnp.asarray(np.concatenate(x))[None] for x in zip(*layer, strict=True))
        samples[i] = []
        mask = jnp.ones(k.shape[:2], bool)
        weight_k, weight_v = weights or (None, None)
        fitted = method.calibrate(
            Sample(k, mask, weight=weight_k), Sample(v, mask, weight=weight_v)
        )
        params.append(jax.tree.map(np.asarray, fitted))
        if on_progress:
            on_progress("fitting", i + 1, len(samples))
    digest = hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
    about = _about(method, decoder.config) | {
        "texts": {"windows": count, "context": length, "tokens": share * count, "sha256": digest}
    }
    return Calibration(tuple(params), about)


def save_calibration(path: str | Path, calibration: Calibration) -> None:
    """Writes a calibration into a new folder, with orbax."""
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(
        params=ocp.args.StandardSave(jax.tree.leaves(calibration.params)),
        about=ocp.args.JsonSave(calibration.about),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), items)


def load_calibration(
    path: str | Path, method: CacheTransform, config: DecoderConfig
) -> Calibration:
    """Reads a calibration.

    Args:
      path: the folder.
      method: that it is to be used with; only what is fitted must be the same.
      config: of the model.

    Raises:
      ValueError: if it was fitted for another method, or for a model of other sizes; and for a
        method that fits nothing to texts.
    """
    import orbax.checkpoint as ocp

    method = _needing_texts(method)

    def empty() -> tuple[Params, ...]:
        states = init_states(config, method, 1, 1, jnp.float32)
        return tuple(method.params(state) for state in states)

    shapes = jax.eval_shape(empty)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = checkpointer.restore(Path(path).absolute(), items).about
        for key, value in _about(method, config).items():
            if about[key] != value:
                raise ValueError(f"{path} was fitted for the {key} {about[key]}, not {value}")
        items = ocp.args.Composite(params=ocp.args.StandardRestore(jax.tree.leaves(shapes)))
        leaves = checkpointer.restore(Path(path).absolute(), items).params
    return Calibration(jax.tree.unflatten(jax.tree.structure(shapes), leaves), about)


@dataclasses.dataclass(frozen=True)
class _Recorder(Dense):
    """A dense cache whose state adds to the keys and values that come.

    Of zeros in the state the loss has the gradients that it has of keys and values, so no model
    needs to know of them.

    Args:
      pre_rope: as the method that is to be fitted.
      rope: of the model, if so.
    """

    pre_rope: bool = False
    rope: tuple[float, ...] | None = None

    def extend(self, state: DenseState, k: Array, v: Array, lengths: Array | None) -> DenseState:
        """Adds a whole window's."""
        del lengths
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return DenseState(state.keys + k, state.values + v, state.length + k.shape[2])

    def segments(self, state: DenseState) -> Segments:
        """Returns the one dense segment."""
        segments = super().segments(state)
        if self.rope is None:
            return segments
        return segments._replace(rope=jnp.asarray(self.rope)[None])

    def attend(
        self,
        state: DenseState,
        q: Float[Array, "B T N H"],
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attends by the implementation that has gradients."""
        del implementation
        return super().attend(
            state,
            q,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            implementation="reference",
        )


# A layer at a time: one compilation serves all layers, and backwards each computes anew what it
# would else have to keep.
_run_layer = jax.jit(jax.checkpoint(Layer.__call__, static_argnums=4), static_argnums=4)


def record(
    decoder: Decoder, tokens: Int[Array, "1 T"], pre_rope: bool, weights: bool
) -> list[tuple[Array, ...]]:
    """Returns keys and values `1 K T H` of each layer.

    Args:
      decoder: the model.
      tokens: a window of text.
      pre_rope: keys from before rotary embedding.
      weights: return squared gradients of the loss with respect to both as well.
    """
    config = decoder.config
    rope = tuple(rope_frequencies(config).tolist()) if pre_rope else None
    recorder = _Recorder(pre_rope, rope)
    states = init_states(config, recorder, 1, tokens.shape[1], decoder.dtype)
    length = states[0].length

    def loss(zeros: list[tuple[Array, Array]]):
        start = tuple(DenseState(k, v, length) for k, v in zeros)
        hidden, states = decoder(tokens, start, recorder, run_layer=_run_layer)
        if not weights:
            return jnp.zeros(()), states
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).sum(), states

    zeros = [(state.keys, state.values) for state in states]
    if not weights:
        return [(state.keys, state.values) for state in loss(zeros)[1]]
    (_, states), gradients = jax.value_and_grad(loss, has_aux=True)(zeros)
    return [
        (state.keys, state.values, *(jnp.square(x.astype(jnp.float32)) for x in gradient))
        for state, gradient in zip(states, gradients, strict=True)
    ]


def _needing_texts(method: CacheTransform) -> Window:
    if not isinstance(method, Window) or not method.needs_texts:
        raise ValueError(f"{method} fits nothing to texts")
    return method


def _windows(
    model: LoadedModel | Decoder, texts: Sequence[str] | Int[np.ndarray, "n T"], context: int
) -> Int[np.ndarray, "n T"]:
    if isinstance(texts, np.ndarray):
        return np.asarray(texts, np.int32)
    if not isinstance(model, LoadedModel):
        raise ValueError("a bare decoder takes windows of token ids, not texts")
    windows = []
    for text in texts:
        ids = model.tokenizer.encode(text)
        windows += [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
    if not windows:
        raise ValueError(f"no text has the {context} tokens of a window")
    return np.asarray(windows, np.int32)


def _about(method: Window, config: DecoderConfig) -> dict[str, Any]:
    sizes = ("num_layers", "num_kv_heads", "head_dim", "width", "vocab_size")
    return {
        "method": method.fitted_parts(),
        "model": {name: getattr(config, name) for name in sizes},
    }
