# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token of each row, with settings and a seed for each row."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kvq_jax.decoding.arguments import PerRow, for_each_row, plain, shown

_DROPPED = np.finfo(np.float32).min.item()
"""The logit of a token that a filter drops; finite, so that no sum becomes NaN."""

_ROUNDING = 1e-6
"""Relative error of a float32 sum of probabilities.

Without this allowance, rounding decides whether tokens of 0.5 and 0.3 have the probability 0.8.
"""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply in the order of the fields.

    Each field takes a number for all rows, or a sequence with one entry for each row; None switches
    a filter off. Among equally likely tokens, filters keep those with the lowest ids.

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep this many of the most likely tokens.
      top_p: keep the smallest set of most likely tokens that has this much probability.
      min_p: keep tokens of at least this share of the most likely one's probability.

    Raises:
      ValueError: for a value out of range.

    Example:
      >>> import kvq_jax as kvq
      >>> kvq.Sampling(temperature=0.7, top_p=0.9)  # for all rows
      Sampling(temperature=0.7, top_k=None, top_p=0.9, min_p=None)
      >>> kvq.Sampling(temperature=[0.0, 1.0])  # two rows: the most likely token, and any
      Sampling(temperature=(0.0, 1.0), top_k=None, top_p=None, min_p=None)
    """

    temperature: float | PerRow = 0.0
    top_k: int | PerRow | None = None
    top_p: float | PerRow | None = None
    min_p: float | PerRow | None = None

    def __post_init__(self):
        for name, field in _FIELDS.items():
            value = plain(getattr(self, name))
            for entry in value if isinstance(value, tuple) else (value,):
                if entry is not None:
                    field.check(name, entry)
            # Numbers and tuples of them hash and compare, whatever the caller gave.
            object.__setattr__(self, name, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """Settings and random key of each row, as arrays: an argument of a jitted function.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: the largest int32 keeps all tokens.
      top_p: 1 keeps all tokens.
      min_p: 0 keeps all tokens.
      key: each draw folds the token's index into it.
      kind: what some row needs: "greedy" for the most likely token, "plain" for draws, "filtered"
        for draws with filters. Static, because a GPU's host would wait to learn it from the device
        in every step; so each kind compiles once, whatever its numbers.
    """

    temperature: Any  # Float[Array, " B"]; while JAX takes a pytree apart, it may be anything
    top_k: Any  # Int[Array, " B"]
    top_p: Any  # Float[Array, " B"]
    min_p: Any  # Float[Array, " B"]
    key: Any  # Key[Array, " B"]
    kind: Literal["greedy", "plain", "filtered"] = dataclasses.field(metadata={"static": True})


def per_row(
    sampling: Sampling | Sequence[Sampling] | None,
    seed: int | PerRow,
    batch_size: int,
) -> RowSampling:
    """Returns the settings and the key of each row.

    Args:
      sampling: one for all rows, or one for each; None takes the most likely tokens.
      seed: one for each row, or one for all, from which row 0 draws as it would with that seed of
        its own, and each other row independently.
      batch_size: B.

    Raises:
      ValueError: for a sequence that hasn't one entry for each row, or a seed that is no integer
        from 0 to 2**64 - 1.
    """
    if sampling is None:
        sampling = Sampling()
    columns = {}
    for name, field in _FIELDS.items():
        if isinstance(sampling, Sampling):
            entries = for_each_row(name, getattr(sampling, name), batch_size)
        else:
            entries = [_of_one(x, name) for x in for_each_row("sampling", sampling, batch_size)]
        columns[name] = field.column(entries)
    arrays = {name: jnp.asarray(column) for name, column in columns.items()}
    return RowSampling(**arrays, key=_row_keys(seed, batch_size), kind=_kind(columns))


def _kind(columns: dict[str, np.ndarray]) -> Literal["greedy", "plain", "filtered"]:
    """Returns what the rows need; see `RowSampling`."""
    draws = columns["temperature"] > 0
    if not draws.any():
        return "greedy"
    filters = (columns["top_k"] < _ALL) | (columns["top_p"] < 1) | (columns["min_p"] > 0)
    return "filtered" if (draws & filters).any() else "plain"


def sample(
    logits: Float[Array, "B V"], sampling: RowSampling, index: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Draws a token for each row.

    A row's token depends on its logits, settings, key and index alone: not on its place in the
    batch, nor on the other rows.

    Args:
      logits: float32.
      sampling: settings and key of each row.
      index: the number of tokens that each row has drawn before.
    """
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling.kind == "greedy":
        return greedy
    draws = sampling.temperature > 0
    # The most likely token at 0: no temperature, however small, makes NaN of it.
    temperature = jnp.where(draws, sampling.temperature, 1.0)[:, None]
    kept = (logits - logits.max(-1, keepdims=True)) / temperature
    if sampling.kind == "filtered":
        kept = _filtered(kept, sampling)
    keys = jax.vmap(jax.random.fold_in)(sampling.key, index)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.where(draws, jnp.argmax(kept + noise, -1).astype(jnp.int32), greedy)


def _filtered(logits: Float[Array, "B V"], sampling: RowSampling) -> Float[Array, "B V"]:
    """Returns the logits with `_DROPPED` for the tokens that the filters drop."""
    logits = _keep_top_p(_keep_top_k(logits, sampling), sampling)
    share = jnp.maximum(sampling.min_p, np.finfo(np.float32).tiny)
    least = logits.max(-1, keepdims=True) + jnp.log(share)[:, None]
    keep = (logits >= least) | (sampling.min_p == 0)[:, None]
    return jnp.where(keep, logits, _DROPPED)


def _keep_top_k(logits: Float[Array, "B V"], sampling: RowSampling) -> Float[Array, "B V"]:
    top_k = jnp.minimum(sampling.top_k, logits.shape[-1])[:, None]
    return _keep_most_likely(logits, jnp.ones(logits.shape, jnp.int32), top_k)


def _keep_top_p(logits: Float[Array, "B V"], sampling: RowSampling) -> Float[Array, "B V"]:
    top_p = sampling.top_p[:, None]
    least = jnp.maximum(top_p * (1 - _ROUNDING), np.finfo(np.float32).tiny)
    kept = _keep_most_likely(logits, jax.nn.softmax(logits, -1), least)
    return jnp.where(top_p < 1, kept, logits)


def _keep_most_likely(
    logits: Float[Array, "B V"], weight: Array, least: Array
) -> Float[Array, "B V"]:
    """Keeps the fewest most likely tokens that have at least this much weight.

    The logit of the last one is found bit by bit, in 32 passes over the vocabulary. Sorting it
    takes 4 times as long on a CPU and breaks no tie.

    Args:
      logits: of all tokens.
      weight: of each token, `B V`.
      least: more than 0, `B 1`.
    """
    # As unsigned integers, floats are in order once the sign is turned around.
    positive_zero = jnp.where(logits == 0, 0.0, logits)
    bits = jax.lax.bitcast_convert_type(positive_zero, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)

    def weight_where(chosen: Array) -> Array:
        return jnp.where(chosen, weight, jnp.zeros_like(weight))

    def add_bit(i: Array, last: Array) -> Array:
        higher = last | (sign >> i.astype(jnp.uint32))
        enough = weight_where(order >= higher).sum(-1, keepdims=True) >= least
        return jnp.where(enough, higher, last)

    last = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((len(logits), 1), jnp.uint32))
    above = weight_where(order > last).sum(-1, keepdims=True)
    equal = weight_where(order == last)
    before = above + jnp.cumsum(equal, -1) - equal
    keep = (order > last) | ((order == last) & (before < least))
    return jnp.where(keep, logits, _DROPPED)


def _row_keys(seed: int | PerRow, batch_size: int) -> Key[Array, " B"]:
    """Returns the key of each row: of its seed, and of its place if all share one seed."""
    seed = plain(seed)
    place = np.zeros(batch_size, np.uint32)
    if not isinstance(seed, tuple):
        place = np.arange(batch_size, dtype=np.uint32)
    seeds = [_seed(entry) for entry in for_each_row("seed", seed, batch_size)]
    words = np.array([[entry >> 32, entry & 0xFFFFFFFF] for entry in seeds], np.uint32)
    # Among JAX's generators, this one draws the same for a row alone and for rows under vmap.
    keys = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(place))


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {shown(value)}")
    return value


def _of_one(sampling: Any, name: str) -> Any:
    """Returns a field of the settings of one row."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling or one for each row, got {shown(sampling)}")
    value = getattr(sampling, name)
    if isinstance(value, tuple):
        raise ValueError(f"{name} in one row's Sampling must be one number, got {shown(value)}")
    return value


class _Field(NamedTuple):
    """What is admitted for a setting.

    Attributes:
      kind: of number.
      dtype: of the array.
      most: what any larger number means the same as.
      default: what None stands for.
      admits: tells which numbers are in range.
      words: the same for an error message.
    """

    kind: type
    dtype: Any
    most: float
    default: float
    admits: Callable[[Any], bool]
    words: str

    def check(self, name: str, value: Any) -> Any:
        """Returns the value.

        Raises:
          ValueError: if it is not admitted.
        """
        if isinstance(value, bool) or not isinstance(value, self.kind) or not self.admits(value):
            raise ValueError(f"{name} must be {self.words}, got {shown(value)}")
        return value

    def column(self, entries: Sequence[Any]) -> np.ndarray:
        """Returns the entries of all rows as an array."""
        filled = [self.default if entry is None else entry for entry in entries]
        return np.array([min(x, self.most) for x in filled], self.dtype)


_INTEGER, _REAL = numbers.Integral, numbers.Real
_LARGE = np.finfo(np.float32).max.item()
_ALL = np.iinfo(np.int32).max
_FIELDS = {
    "temperature": _Field(_REAL, np.float32, _LARGE, 0.0, lambda x: 0 <= x < math.inf, "0 or more"),
    "top_k": _Field(_INTEGER, np.int32, _ALL, _ALL, lambda x: x >= 1, "at least 1"),
    "top_p": _Field(_REAL, np.float32, 1.0, 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": _Field(_REAL, np.float32, 1.0, 0.0, lambda x: 0 <= x <= 1, "0 to 1"),
}
