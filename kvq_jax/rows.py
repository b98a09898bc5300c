# SPDX-License-Identifier: Apache-2.0
"""Surgery on the rows of any state: beam search, and slots of a serving batch."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

from kvq_jax.base import CodedSegment, Shared


def select_rows[S](state: S, rows: Int[Array, " b"]) -> S:
    """Returns the state (or a tuple of layers' states) made of the given rows, in that order.

    A row may be taken more than once, as beam search does; copies don't share anything.

    Args:
      state: the cache.
      rows: indices of rows; under `jax.jit` one out of range gives the last row, elsewhere it
        raises.

    Raises:
      ValueError: for indices that aren't one axis of integers or out of range.
    """
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"rows must be one axis of integers, got {rows.dtype}{rows.shape}")
    _check_row(state, rows)

    def select(part):
        if isinstance(part, Shared):
            return part
        if not isinstance(part, CodedSegment):
            return part[rows]
        table = part.block_table[rows]

        def take(x):
            return x[table.reshape(-1)]

        return part._replace(
            keys=jax.tree.map(take, part.keys),
            values=jax.tree.map(take, part.values),
            block_table=jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape),
            num_coded=part.num_coded[rows],
        )

    return jax.tree.map(select, state, is_leaf=_is_special)


def insert_row[S](state: S, slot: int | Int[Array, ""], row: S) -> S:
    """Returns the state with one row replaced, such as by a new request's prefilled prompt.

    Args:
      state: the cache (or a tuple of layers' states).
      slot: the row to replace.
      row: a state of batch size 1 and otherwise the same shapes.

    Raises:
      ValueError: if the shapes don't fit, or the slot is out of range (outside `jax.jit`).
    """
    slot = jnp.asarray(slot)
    _check_row(state, slot)

    def insert(whole, part):
        if isinstance(whole, Shared):
            return whole
        if not isinstance(whole, CodedSegment):
            _check_insert(whole, part)
            return whole.at[slot].set(part[0])
        _check_insert(whole.block_table, part.block_table)
        into, source = whole.block_table[slot], part.block_table[0]

        def put(x, y):
            _check_insert(x, y[:1])
            return x.at[into].set(y[source])

        return whole._replace(
            keys=jax.tree.map(put, whole.keys, part.keys),
            values=jax.tree.map(put, whole.values, part.values),
            num_coded=whole.num_coded.at[slot].set(part.num_coded[0]),
        )

    return jax.tree.map(insert, state, row, is_leaf=_is_special)


def _is_special(x) -> bool:
    return isinstance(x, CodedSegment | Shared)


def _check_row(state, rows: Array) -> None:
    first = jax.tree.leaves(state, is_leaf=_is_special)[0]
    batch_size = (first.num_coded if isinstance(first, CodedSegment) else first).shape[0]
    if not isinstance(rows, Tracer) and ((rows < 0) | (rows >= batch_size)).any():
        raise ValueError(f"rows must be 0 to {batch_size - 1}, got {rows.tolist()}")


def _check_insert(whole: Array, part: Array) -> None:
    """Raises if a row (or one of its blocks) is not of the shape of the whole's."""
    if part.shape != (1, *whole.shape[1:]) or part.dtype != whole.dtype:
        raise ValueError(
            f"a row of {part.dtype}{part.shape} does not fit into a state of "
            f"{whole.dtype}{whole.shape}: make it with batch_size=1 and the same capacity"
        )
