# SPDX-License-Identifier: Apache-2.0
"""Arguments of `generate` as plain Python objects, and in error messages."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

PerRow = Sequence[int | float | None] | np.ndarray | jax.Array
"""One entry for each row; None stands for the default."""


def plain(value: Any) -> Any:
    """Returns Python numbers for NumPy's and JAX's, and a tuple for a sequence or array."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(map(plain, value))
    return value


def for_each_row(name: str, value: Any, batch_size: int) -> Sequence[Any]:
    """Returns one entry for each row.

    Raises:
      ValueError: for a sequence of another length.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * batch_size
    if len(value) != batch_size:
        raise ValueError(f"{name} has {len(value)} entries for {batch_size} prompts")
    return value


def shown(value: Any) -> str:
    """Returns the repr of a value for an error message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
