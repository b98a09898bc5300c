# SPDX-License-Identifier: Apache-2.0
"""Fitting methods to texts, once for all prompts."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CacheSpec, CacheTransform, Implementation, Params, State
from kvq_jax.codecs.base import Sample
from kvq_jax.decoding.generation import generate
from kvq_jax.decoding.sampling import Sampling
from kvq_jax.engines import Window
from kvq_jax.kernels.decode_attention import plain
from kvq_jax.methods.dense import Dense, dense
from kvq_jax.models import Decoder, DecoderConfig, Layer, LoadedModel, init_states
from kvq_jax.models.layers import rope_frequencies


class Calibration(NamedTuple):
    """What `calibrate` returns.

    Attributes:
      method: to use with them. It is the one that was given, unless texts decide more of it than
        parameters: such as how many bits each layer gets.
      params: of each layer, for `CacheTransform.with_params`.
      about: what they were fitted for and on: method, sizes of the model, digest of the texts.
    """

    method: CacheTransform
    params: tuple[Params, ...]
    about: dict[str, Any]


def calibrate(
    model: LoadedModel | Decoder,
    texts: Sequence[str] | Int[np.ndarray, "n T"] | None,
    method: CacheTransform,
    *,
    context: int | None = None,
    num_tokens: int = 8192,
    skip_first: int = 1,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Fits a method to the keys and values that texts have in a model.

    Texts go through the model one window after another. Of each, keys, values and, if the method
    asks for them, gradients of the loss with respect to both are kept at random positions,
    `num_tokens` in all: that much host memory is needed, whatever the length of the texts.

    Args:
      model: from `kvq_jax.models.load`; or a bare decoder, which takes token ids.
      texts: texts, each cut into windows and what is left of it dropped; or token ids, a window a
        row; or None: the model draws its own (`sample_texts`), twice `num_tokens`. Of 8 windows
        that SmolLM2 drew it depended which, by a third of the KL of transform coding; half of the
        tokens of 16 windows did as well as the better 8.
      method: one with `needs_texts`.
      context: tokens of a window of text; None means 512, or 1024 of what the model draws.
      num_tokens: tokens to fit to.
      skip_first: tokens at the start of each window that are left out: attention sinks, whose
        keys are unlike all others.
      seed: of the positions.
      on_progress: called with (what is done, how often, out of how many).

    Raises:
      ValueError: for a method that fits nothing to texts, and texts shorter than a window.
    """
    return calibrate_all(
        model,
        texts,
        {"method": method},
        context=context,
        num_tokens=num_tokens,
        skip_first=skip_first,
        seed=seed,
        on_progress=on_progress,
    )["method"]


def calibrate_all(
    model: LoadedModel | Decoder,
    texts: Sequence[str] | Int[np.ndarray, "n T"] | None,
    methods: Mapping[str, CacheTransform],
    *,
    context: int | None = None,
    num_tokens: int = 8192,
    skip_first: int = 1,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Calibration]:
    """Fits several methods; see `calibrate`, which makes the same of each of them.

    Texts are drawn once, and go through the model once for all methods that want the same of it:
    that, with gradients, is most of the time of a fit.

    Args:
      model: as in `calibrate`.
      texts: likewise.
      methods: by any names.
      context: as in `calibrate`.
      num_tokens: likewise.
      skip_first: likewise.
      seed: likewise.
      on_progress: likewise; it starts again for other methods.

    Returns:
      Calibrations by the names of the methods.

    Raises:
      ValueError: as `calibrate` does.
    """
    alike: dict[tuple[bool, bool, int], dict[str, Window]] = {}
    for name, method in methods.items():
        method = _needing_texts(method)
        exact = method.residual_length + 1 if method.needs_gradients else 0
        alike.setdefault((method.pre_rope, method.needs_gradients, exact), {})[name] = method
    decoder = model.decoder if isinstance(model, LoadedModel) else model
    if texts is None:
        context = 1024 if context is None else context
        windows = sample_texts(decoder, -(-2 * num_tokens // context), context, seed, on_progress)
    else:
        windows = _windows(model, texts, 512 if context is None else context)
    count, length = windows.shape
    share = min(-(-num_tokens // count), length - skip_first)
    digest = hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest()
    of_texts = {"windows": count, "context": length, "tokens": share * count, "sha256": digest}
    calibrations = {}
    for (pre_rope, gradients, exact), some in alike.items():
        rng = np.random.default_rng(seed)
        samples: list[list[tuple[np.ndarray, ...]]] = [[] for _ in decoder.layers]
        for i, window in enumerate(windows):
            at = np.sort(rng.choice(np.arange(skip_first, length), share, replace=False))
            tokens = jnp.asarray(window)[None]
            recorded = record(decoder, tokens, pre_rope=pre_rope, gradients=gradients, exact=exact)
            for layer, arrays in zip(samples, recorded, strict=True):
                layer.append(tuple(np.asarray(x)[0][:, at].swapaxes(0, 1) for x in arrays))
            if on_progress:
                on_progress("reading", i + 1, count)
        fitted: dict[str, list[Any]] = {name: [] for name in some}
        for i, layer in enumerate(samples):
            k, v, *slopes = (jnp.asarray(np.concatenate(x))[None] for x in zip(*layer, strict=True))
            samples[i] = []
            mask = jnp.ones(k.shape[:2], bool)
            of_k, of_v = slopes or (None, None)
            pair = Sample(k, mask, gradient=of_k), Sample(v, mask, gradient=of_v)
            for name, method in some.items():
                fitted[name].append(jax.tree.map(np.asarray, method.calibrate(*pair)))
            if on_progress:
                on_progress("fitting", i + 1, len(samples))
        for name, method in some.items():
            method, params = method.settle(fitted[name], decoder.config.num_kv_heads)
            about = _about(method, decoder.config) | {"sizes": method.sizes(), "texts": of_texts}
            params = tuple(jax.tree.map(np.asarray, x) for x in params)
            calibrations[name] = Calibration(method, params, about)
    return {name: calibrations[name] for name in methods}


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
      method: that it is to be used with; only what is fitted must be the same. What texts have
        decided of it is in the `method` of the calibration.
      config: of the model.

    Raises:
      ValueError: if it was fitted for another method, or for a model of other sizes; and for a
        method that fits nothing to texts.
    """
    import orbax.checkpoint as ocp

    method = _needing_texts(method)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = checkpointer.restore(Path(path).absolute(), items).about
        for key, value in _about(method, config).items():
            if about[key] != value:
                raise ValueError(f"{path} was fitted for the {key} {about[key]}, not {value}")
        method = method.with_sizes(about["sizes"])
        shapes = jax.eval_shape(lambda: _empty(method, config))
        items = ocp.args.Composite(params=ocp.args.StandardRestore(jax.tree.leaves(shapes)))
        leaves = checkpointer.restore(Path(path).absolute(), items).params
    return Calibration(method, jax.tree.unflatten(jax.tree.structure(shapes), leaves), about)


class _Recorded(NamedTuple):
    """What a `_Recorder` keeps: keys and values with `added` to them, which is zeros."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    added: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
    length: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class _Recorder(Dense):
    """A dense cache that adds zeros to the keys and values that come, seen from far.

    Of these zeros the loss has the gradients that it has of keys and values which a cache reads
    from codes, so no model needs to know of them.

    Args:
      exact: a query sees this many latest tokens, its own included, without what is added.
      rope: of the model, for keys from before rotary embedding.
    """

    exact: int = 0
    rope: tuple[float, ...] | None = None
    pre_rope: bool = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "pre_rope", self.rope is not None)

    def init(self, spec: CacheSpec, layer: int | None = None) -> State:
        """Returns an empty cache that adds zeros."""
        zeros = super().init(spec, layer)
        return _Recorded(zeros.keys, zeros.values, (zeros.keys, zeros.values), zeros.length)

    def extend(self, state: State, k: Array, v: Array, lengths: Array | None) -> State:
        """Takes a whole window's."""
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
        """Attends to all tokens twice, with and without what is added, and takes what counts."""
        del implementation
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


# A layer at a time: one compilation serves all layers, and backwards each computes anew what it
# would else have to keep.
_run_layer = jax.jit(jax.checkpoint(Layer.__call__, static_argnums=4), static_argnums=4)


def record(
    decoder: Decoder,
    tokens: Int[Array, "1 T"],
    *,
    pre_rope: bool,
    gradients: bool,
    exact: int = 0,
) -> list[tuple[Array, ...]]:
    """Returns keys and values `1 K T H` of each layer.

    Args:
      decoder: the model.
      tokens: a window of text.
      pre_rope: keys from before rotary embedding.
      gradients: return those of the loss with respect to both as well.
      exact: gradients are without what a query sees in so many latest tokens, its own included.
    """
    config = decoder.config
    recorder = _Recorder(exact, tuple(rope_frequencies(config).tolist()) if pre_rope else None)
    empty = init_states(config, recorder, 1, tokens.shape[1], decoder.dtype)

    def loss(zeros: list[tuple[Array, Array]]):
        start = tuple(x._replace(added=added) for x, added in zip(empty, zeros, strict=True))
        hidden, states = decoder(tokens, start, recorder, run_layer=_run_layer)
        if not gradients:
            return jnp.zeros(()), states
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).sum(), states

    zeros = [state.added for state in empty]
    if not gradients:
        return [(state.keys, state.values) for state in loss(zeros)[1]]
    (_, states), slopes = jax.value_and_grad(loss, has_aux=True)(zeros)
    return [(state.keys, state.values, *slope) for state, slope in zip(states, slopes, strict=True)]


def sample_texts(
    decoder: Decoder,
    num_windows: int,
    context: int,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Int[np.ndarray, "n T"]:
    """Returns windows of text that the model draws itself, each from a random first token.

    Args:
      decoder: the model.
      num_windows: n; they are drawn together, with a dense cache for all.
      context: T.
      seed: of the draws.
      on_progress: called with ("sampling", tokens of a window done, context).
    """
    done = itertools.count(2)

    def on_tokens(tokens: np.ndarray) -> None:
        del tokens
        if on_progress:
            on_progress("sampling", next(done), context)

    first = np.random.default_rng(seed).integers(0, decoder.config.vocab_size, (num_windows, 1))
    drawn = generate(
        decoder,
        first.tolist(),
        method=dense(),
        max_new_tokens=context - 1,
        sampling=Sampling(temperature=1.0),
        seed=seed,
        on_tokens=on_tokens,
    ).tokens
    return np.concatenate([first, drawn], axis=1).astype(np.int32)


def _empty(method: Window, config: DecoderConfig) -> tuple[Params, ...]:
    """Returns the parameters of each layer before anything is fitted."""
    states = init_states(config, method, 1, 1, jnp.float32)
    return tuple(method.params(state) for state in states)


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
