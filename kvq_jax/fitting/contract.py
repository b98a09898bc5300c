# SPDX-License-Identifier: Apache-2.0
"""All that fitting needs to know of a method: what it asks of texts, and how it is fitted."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvq_jax.base import CacheTransform, Params
from kvq_jax.codecs.base import Part, Sample
from kvq_jax.engines import Window
from kvq_jax.engines.window import Fitted
from kvq_jax.fitting.record import Recording
from kvq_jax.models import DecoderConfig, init_states
from kvq_jax.sharding import Sharded

_DECIDED = ("params", "sizes")
"""Fields of a codec that calibration decides, so that they don't describe what was asked for."""


class Needs(NamedTuple):
    """How texts are to be recorded for a method. Methods that need the same share a recording.

    Attributes:
      pre_rope: keys and queries from before rotary embedding.
      gradients: gradients of the loss.
      exact: latest tokens that gradients leave out, for they are in full precision.
    """

    pre_rope: bool
    gradients: bool
    exact: int


def fitted_window(method: CacheTransform, name: str = "the method") -> Window:
    """Returns the method that is fitted: the given one, or the one that a `Sharded` shares out.

    Args:
      method: the method.
      name: what the caller calls it.

    Raises:
      ValueError: for a method without anything to fit.
    """
    window = method.method if isinstance(method, Sharded) else method
    if not isinstance(window, Window) or not window.needs_texts:
        raise ValueError(f"{name} needs no calibration: it fits nothing to texts")
    return window


def with_window(method: CacheTransform, window: Window) -> CacheTransform:
    """Returns the method with another one in place of what `fitted_window` returned."""
    return dataclasses.replace(method, method=window) if isinstance(method, Sharded) else window


def needs(window: Window) -> Needs:
    """Returns how texts are to be recorded for a method."""
    exact = window.residual_length + 1 if window.needs_gradients else 0
    return Needs(window.pre_rope, window.needs_gradients, exact)


def needs_queries(window: Window) -> bool:
    """Returns whether a part of the method is fitted with queries."""
    return any(part.use_queries for part in _fitted_parts(window).values())


def fit_layer(window: Window, recording: Recording) -> Any:
    """Returns what a method makes of one layer's keys and values, for `settle`."""
    k, v, q, key_gradient, value_gradient = (
        None if x is None else jnp.asarray(x).swapaxes(1, 2) for x in recording
    )
    assert k is not None and v is not None
    mask = jnp.ones(k.shape[:2], bool)
    keys = Sample(k, mask, q=q if needs_queries(window) else None, gradient=key_gradient)
    return window.calibrate(keys, Sample(v, mask, gradient=value_gradient))


def settle(
    window: Window, fitted: Sequence[Any], config: DecoderConfig
) -> tuple[Window, Sequence[Params]]:
    """Returns the method to use and each layer's parameters, once all layers are fitted."""
    return window.settle(fitted, config.num_kv_heads)


def describe(window: Window, config: DecoderConfig) -> dict[str, Any]:
    """Returns what a fit depends on, as JSON: the method's fitted parts and the model's sizes."""
    base = {field.name for field in dataclasses.fields(Window)}
    own = {k: v for k, v in _json(window).items() if k not in base}
    parts = {name: _json(part) for name, part in _fitted_parts(window).items()}
    sizes = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "width", "vocab_size")
    return {
        "method": own | parts,
        "model": {name: getattr(config, name) for name in sizes},
    }


def sizes(window: Window) -> Any:
    """Returns the sizes that calibration decided, as JSON; None if it decides none."""
    return window.sizes()


def with_sizes(window: Window, sizes: Any) -> Window:
    """Returns a method with the sizes that a calibration decided.

    Raises:
      ValueError: for what are not sizes of this method.
    """
    sized = window.with_sizes(sizes)
    if sized.sizes() != sizes:
        raise ValueError("this method has no such sizes")
    return sized


def empty_params(window: Window, config: DecoderConfig) -> tuple[Params, ...]:
    """Returns the shapes of each layer's parameters, without making any."""

    def make() -> tuple[Params, ...]:
        return tuple(map(window.params, init_states(config, window, 1, 1, jnp.float32)))

    return jax.eval_shape(make)


def _fitted_parts(window: Window) -> dict[str, Part]:
    parts = {name: getattr(window, name) for name in Fitted._fields}
    return {name: part for name, part in parts.items() if part.fits == "texts"}


def _json(value: Any) -> Any:
    """Returns a description of a dataclass in the types of JSON."""
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        described = {name: _json(getattr(value, name)) for name in fields if name not in _DECIDED}
        return {"name": type(value).__name__} | described
    if isinstance(value, tuple):
        return [_json(x) for x in value]
    return value
