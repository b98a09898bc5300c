# SPDX-License-Identifier: Apache-2.0
"""What a cache costs: quality against the dense cache, and bits."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvq_jax.base import CacheTransform, Params, Shared, State, nbytes
from kvq_jax.methods import dense
from kvq_jax.models import Decoder, DecoderConfig, Layer, init_states


@dataclasses.dataclass(frozen=True)
class Quality:
    """How a cache predicts a text.

    Attributes:
      bits_per_element: of a row's state with bfloat16 dense parts, at the context's capacity, over
        the number of keys and values.
      shared_bytes: that all rows share besides, fitted to texts.
      context: tokens of a window.
      tokens: predictions that were scored.
      perplexity: of the text.
      kl: mean KL(dense cache || this cache) of the next-token distribution, in nats.
      kl_stderr: standard error of kl, predictions taken as independent.
      kl_p99: 99th percentile.
      top1: share of predictions whose most likely token is that of the dense cache.
    """

    bits_per_element: float
    shared_bytes: int
    context: int
    tokens: int
    perplexity: float
    kl: float
    kl_stderr: float
    kl_p99: float
    top1: float


def evaluate(
    decoder: Decoder,
    windows: Int[Array, "B T"] | np.ndarray,
    methods: dict[str, CacheTransform],
    *,
    skip: int = 128,
    params: Mapping[str, Sequence[Params]] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Quality]:
    """Measures the prediction of each next token of some windows of text, as when decoding.

    Every token attends to the cache as it stood when the token came: what the method had coded
    by then is read from its codes. Tokens go through in calls of the sizes that
    `CacheTransform.exact_calls` gives, which changes nothing but the speed. A method that needs a
    prompt gets the tokens that are not scored as one.

    Args:
      decoder: the model.
      windows: token ids, one window a row.
      methods: by name.
      skip: predictions at the start of a window that are not scored, since most methods have
        coded nothing then.
      params: of each layer, from `kvq_jax.calibrate`, of those methods that need texts.
      on_progress: called with (method or "dense", tokens done, tokens of a window).
    """
    return dict(
        evaluate_each(decoder, windows, methods, skip=skip, params=params, on_progress=on_progress)
    )


def evaluate_each(
    decoder: Decoder,
    windows: Int[Array, "B T"] | np.ndarray,
    methods: dict[str, CacheTransform],
    *,
    skip: int = 128,
    params: Mapping[str, Sequence[Params]] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[str, Quality]]:
    """Yields each method's name and figures as soon as they are there; see `evaluate`."""
    windows = np.asarray(windows, np.int32)
    context = windows.shape[1]
    if context - 1 <= skip:
        raise ValueError(f"windows of {context} tokens leave nothing to score after skip={skip}")
    params = {} if params is None else params
    _check_params(methods, params)

    def run(name: str, method: CacheTransform) -> Array:
        progress = on_progress and functools.partial(on_progress, name)
        return _hidden_states(decoder, windows, method, skip, params.get(name), progress)

    reference = run("dense", dense())
    for name, method in methods.items():
        hidden = reference if method == dense() else run(name, method)
        parts = []
        for start in range(skip, context - 1, 128):  # logits of a few tokens at a time
            part = slice(start, min(start + 128, context - 1))
            targets = windows[:, part.start + 1 : part.stop + 1]
            parts.append(_compare(decoder, reference[:, part], hidden[:, part], targets))
        nll, kl, same = (
            np.concatenate(x, axis=1, dtype=np.float64) for x in zip(*parts, strict=True)
        )
        yield (
            name,
            Quality(
                bits_per_element=bits_per_element(method, decoder.config, context),
                shared_bytes=shared_bytes(method, decoder.config),
                context=context,
                tokens=nll.size,
                perplexity=float(np.exp(nll.mean())),
                kl=float(kl.mean()),
                kl_stderr=float(kl.std() / np.sqrt(kl.size)),
                kl_p99=float(np.quantile(kl, 0.99)),
                top1=float(same.mean()),
            ),
        )


def recall(
    decoder: Decoder,
    windows: Int[Array, "B T"] | np.ndarray,
    num_answered: int,
    methods: dict[str, CacheTransform],
    *,
    skip: int = 128,
    params: Mapping[str, Sequence[Params]] | None = None,
) -> dict[str, float]:
    """Returns the share of windows whose last tokens are what greedy decoding would answer.

    Args:
      decoder: the model.
      windows: token ids, one question with its answer a row.
      num_answered: tokens of the answer.
      methods: by name.
      skip: as in `evaluate`.
      params: as in `evaluate`.
    """
    windows = np.asarray(windows, np.int32)
    params = {} if params is None else params
    _check_params(methods, params)
    shares = {}
    for name, method in methods.items():
        hidden = _hidden_states(decoder, windows, method, skip, params.get(name), None)
        answers = np.asarray(_likeliest(decoder, hidden[:, -num_answered - 1 : -1]))
        shares[name] = float((answers == windows[:, -num_answered:]).all(1).mean())
    return shares


def _check_params(methods: dict[str, CacheTransform], params: Mapping) -> None:
    for name, method in methods.items():
        if method.needs_texts and name not in params:
            raise ValueError(f"{name} needs parameters: kvq_jax.calibrate makes them")


def _hidden_states(
    decoder: Decoder,
    windows: Int[np.ndarray, "B T"],
    method: CacheTransform,
    skip: int,
    params: Sequence[Params] | None,
    on_progress: Callable[[int, int], None] | None,
) -> Array:
    """Returns the last hidden states `B T D`, each token's from the cache as it stood then."""
    num_windows, context = windows.shape
    cache = init_states(decoder.config, method, num_windows, context, decoder.dtype, params)
    parts, start = [], 0
    if method.needs_prompt and skip:
        tokens = jnp.asarray(windows[:, :skip])
        hidden, cache = decoder.prefill(tokens, cache, method, run_layer=_prefill_layer)
        parts, start = [hidden], skip
    # The last token's prediction is of no use; but with it calls are more often of one size.
    for end in itertools.accumulate(method.exact_calls(context)):
        if end <= start:
            continue
        tokens = jnp.asarray(windows[:, start:end])
        hidden, cache = decoder(tokens, cache, method, run_layer=_run_layer)
        parts.append(hidden.block_until_ready())
        start = end
        if on_progress:
            on_progress(start, context)
    return jnp.concatenate(parts, axis=1)


@jax.jit
def _likeliest(decoder: Decoder, hidden: Array) -> Array:
    return decoder.logits(hidden).argmax(-1)


# A layer at a time: one compilation serves all layers.
_run_layer = jax.jit(Layer.__call__, static_argnames="cache", donate_argnames="state")
_prefill_layer = jax.jit(Layer.prefill, static_argnames="cache", donate_argnames="state")


@jax.jit
def _compare(decoder: Decoder, reference: Array, hidden: Array, targets: Array):
    """Returns negative log likelihood, KL and whether the most likely token is the same."""
    p, q = (jax.nn.log_softmax(decoder.logits(x)) for x in (reference, hidden))
    nll = -jnp.take_along_axis(q, targets[..., None], -1)[..., 0]
    return nll, (jnp.exp(p) * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def consecutive_windows(tokens: Sequence[int], context: int, num_windows: int) -> np.ndarray:
    """Returns the first windows of a text, one after the other, `int32[num_windows, context]`."""
    if context < 2 or num_windows < 1 or len(tokens) < context * num_windows:
        raise ValueError(
            f"{num_windows} windows of {context} tokens can't be cut from {len(tokens)} tokens"
        )
    return np.asarray(tokens[: context * num_windows], np.int32).reshape(num_windows, context)


def bits_per_element(method: CacheTransform, config: DecoderConfig, length: int) -> float:
    """Returns the bits of one row's state over its keys and values, everything counted.

    But for what all rows share, which is not a matter of the cache's size: see `shared_bytes`.

    Args:
      method: the method.
      config: of the model.
      length: capacity of the cache; its dense parts are bfloat16.
    """
    init = functools.partial(init_states, config, method, 1, length, jnp.bfloat16)
    states = jax.eval_shape(init)
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length
    return 8 * (nbytes(states) - _shared(states)) / numbers


def shared_bytes(method: CacheTransform, config: DecoderConfig) -> int:
    """Returns the bytes that a method keeps once for all rows: what is fitted to texts."""
    return _shared(jax.eval_shape(lambda: init_states(config, method, 1, 1, jnp.bfloat16)))


def _shared(states: tuple[State, ...]) -> int:
    parts = jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, Shared))
    return nbytes([x for x in parts if isinstance(x, Shared)])
