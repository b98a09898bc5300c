# SPDX-License-Identifier: Apache-2.0
"""Fitting methods to calibration texts, once for all prompts."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvq_jax.base import CacheTransform
from kvq_jax.engines import Window
from kvq_jax.fitting import contract
from kvq_jax.fitting.record import Recording, record
from kvq_jax.fitting.store import Calibration
from kvq_jax.fitting.texts import cut_windows, sample_texts
from kvq_jax.models import Decoder, LoadedModel

Texts = str | Sequence[str] | Sequence[Sequence[int]] | Int[np.ndarray, "n T"] | None
"""Calibration text; see `calibrate`."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how often it was done, and out of how many times."""


def calibrate(
    model: LoadedModel | Decoder,
    texts: Texts,
    method: CacheTransform,
    *,
    context: int | None = None,
    num_tokens: int = 8192,
    skip_first: int = 1,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Calibration:
    """Fits a method to the keys and values of calibration texts.

    The model reads the texts one window after another. In each window, random positions are
    chosen, and their keys and values are kept; so are their queries and the gradients of the loss
    with respect to keys and values, if the method asks for these. Host memory holds `num_tokens`
    positions, however long the texts are.

    Args:
      model: from `kvq_jax.models.load`; or a bare decoder, which takes token ids.
      texts: one or more texts, each cut into windows, without the rest that fills none; or token
        ids, with a window in each row; or None for self-generated text, of twice `num_tokens`.
        With only 8 sampled windows, KL varied by a third from draw to draw; half the tokens of 16
        windows matched the better draws.
      method: a method with `needs_texts`, or a `Sharded` one.
      context: tokens of a window; None means 512, or 1024 for self-generated text. Token ids are
        windows already.
      num_tokens: positions to fit to, fewer if the texts have fewer.
      skip_first: tokens at the start of each window to leave out: attention sinks, whose keys are
        unlike all others.
      seed: seed of the positions and of self-generated text.
      on_progress: called with (what is being done, how often it was done, out of how many times).

    Returns:
      The method to use, each layer's parameters, and what they were fitted to.

    Raises:
      ValueError: for a method that needs no calibration, texts without a whole window, token ids
        outside the vocabulary, numbers out of range, and a model whose keys, values or gradients
        are not finite.
    """
    fitted = calibrate_each(
        model,
        texts,
        {"the method": method},
        context=context,
        num_tokens=num_tokens,
        skip_first=skip_first,
        seed=seed,
        on_progress=on_progress,
    )
    return dict(fitted)["the method"]


def calibrate_all(
    model: LoadedModel | Decoder,
    texts: Texts,
    methods: Mapping[str, CacheTransform],
    *,
    context: int | None = None,
    num_tokens: int = 8192,
    skip_first: int = 1,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Calibration]:
    """Fits several methods, and returns their calibrations by name; see `calibrate_each`."""
    fitted = calibrate_each(
        model,
        texts,
        methods,
        context=context,
        num_tokens=num_tokens,
        skip_first=skip_first,
        seed=seed,
        on_progress=on_progress,
    )
    found = dict(fitted)
    return {name: found[name] for name in methods}


def calibrate_each(
    model: LoadedModel | Decoder,
    texts: Texts,
    methods: Mapping[str, CacheTransform],
    *,
    context: int | None = None,
    num_tokens: int = 8192,
    skip_first: int = 1,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Iterator[tuple[str, Calibration]]:
    """Fits several methods, and yields each name and calibration as soon as it is there.

    Each calibration is the one that `calibrate` returns. But texts are sampled once, and the model
    reads them once for all methods that record the same: with gradients, that takes most of the
    time of a fit. So methods come in the order of what they record.

    Args:
      model: see `calibrate`.
      texts: see `calibrate`.
      methods: the methods by names of your choice.
      context: see `calibrate`.
      num_tokens: see `calibrate`.
      skip_first: see `calibrate`.
      seed: see `calibrate`.
      on_progress: see `calibrate`; it starts again for each method.

    Raises:
      ValueError: see `calibrate`. Arguments are checked at once, before the first is fitted.
    """
    alike: dict[contract.Needs, dict[str, CacheTransform]] = {}
    for name, method in methods.items():
        needs = contract.needs(contract.fitted_window(method, name))
        alike.setdefault(needs, {})[name] = method
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if skip_first < 0:
        raise ValueError(f"skip_first must be at least 0, got {skip_first}")
    decoder = model.decoder if isinstance(model, LoadedModel) else model
    if context is None:
        context = 1024 if texts is None else 512
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    windows = None if texts is None else cut_windows(model, texts, context)
    length = context if windows is None else windows.shape[1]
    if skip_first >= length:
        raise ValueError(f"skip_first={skip_first} leaves nothing of windows of {length} tokens")

    def fit_all() -> Iterator[tuple[str, Calibration]]:
        read = windows
        if read is None:
            count = -(-2 * num_tokens // length)
            read = sample_texts(decoder, count, length, seed, on_progress)
        share = min(-(-num_tokens // len(read)), length - skip_first)
        of_texts = {
            "windows": len(read),
            "context": length,
            "tokens": share * len(read),
            "sha256": hashlib.sha256(np.ascontiguousarray(read).tobytes()).hexdigest(),
        }
        for needs, some in alike.items():
            inner = {name: contract.fitted_window(method, name) for name, method in some.items()}
            queries = any(map(contract.needs_queries, inner.values()))
            rng = np.random.default_rng(seed)
            positions = np.arange(skip_first, length)
            at = [np.sort(rng.choice(positions, share, replace=False)) for _ in read]
            samples = _read(decoder, read, at, needs, queries, on_progress)
            for name, window in inner.items():
                window, params, metadata = _fit(decoder, window, samples, on_progress)
                method = contract.with_window(some[name], window)
                yield name, Calibration(method, params, metadata | {"texts": of_texts})

    return fit_all()


def _read(
    decoder: Decoder,
    windows: Int[np.ndarray, "n T"],
    positions: Sequence[Int[np.ndarray, " share"]],
    needs: contract.Needs,
    queries: bool,
    on_progress: Progress | None,
) -> list[Recording]:
    """Returns what each layer's cache is given at some positions of each window."""
    samples: list[list[Recording]] = [[] for _ in decoder.layers]
    for i, (window, at) in enumerate(zip(windows, positions, strict=True)):
        recorded = record(
            decoder,
            jnp.asarray(window)[None],
            pre_rope=needs.pre_rope,
            gradients=needs.gradients,
            queries=queries,
            exact=needs.exact,
        )
        for number, (layer, recording) in enumerate(zip(samples, recorded, strict=True)):
            chosen = jax.tree.map(lambda x, at=at: np.asarray(x)[:, :, at], recording)
            _check_finite(chosen, number, i)
            layer.append(chosen)
        if on_progress:
            on_progress("reading", i + 1, len(windows))
    return [
        jax.tree.map(lambda *x: np.concatenate(x, axis=2), *samples.pop(0)) for _ in decoder.layers
    ]


def _check_finite(recording: Recording, layer: int, window: int) -> None:
    for name, x in recording._asdict().items():
        if x is not None and not np.isfinite(x).all():
            raise ValueError(
                f"the {name.replace('_', ' ')} of layer {layer} in window {window} of the texts "
                "have NaN or infinite numbers: nothing can be fitted to them"
            )


def _fit(
    decoder: Decoder,
    window: Window,
    samples: Sequence[Recording],
    on_progress: Progress | None,
) -> tuple[Window, tuple[Any, ...], dict[str, Any]]:
    """Returns the method to use, each layer's parameters, and what they are fitted for."""
    fitted = []
    for i, recording in enumerate(samples):
        fitted.append(jax.tree.map(np.asarray, contract.fit_layer(window, recording)))
        if on_progress:
            on_progress("fitting", i + 1, len(samples))
    window, params = contract.settle(window, fitted, decoder.config)
    metadata = contract.describe(window, decoder.config) | {"sizes": contract.sizes(window)}
    return window, tuple(jax.tree.map(np.asarray, x) for x in params), metadata
