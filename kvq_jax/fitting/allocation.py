# SPDX-License-Identifier: Apache-2.0
"""Sharing out a budget of bits among tensors that lose differently by quantization.

Imports nothing of the project, so that methods may use it too.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float


def allocate(
    costs: Float[np.ndarray, "n choices"],
    sizes: Sequence[float | int],
    budget: float | int,
    solver: Literal["greedy", "milp"] = "milp",
) -> list[int]:
    """Returns a choice for each item, of small total cost within a budget of size.

    Args:
      costs: cost of each item's choices, such as the error that a number of bits leaves.
      sizes: sizes of the choices, ascending, the same for all items.
      budget: the most that the mean size of the items may be.
      solver: "greedy" takes the step up that saves the most for its size, over and over, as long
        as one fits and saves something; it suits tens of thousands of items. "milp" finds the best
        choice of all, with SciPy.

    Raises:
      ValueError: for sizes that don't ascend, or of another number than the choices; and for a
        budget below the smallest size.
    """
    num_items, num_choices = costs.shape
    widths = np.asarray(sizes, float)
    if len(widths) != num_choices or (np.diff(widths) <= 0).any():
        raise ValueError(f"sizes must ascend, one for each of {num_choices} choices: {sizes}")
    room = float(num_items * budget)
    if num_items * widths[0] > room:
        raise ValueError(f"a budget of {budget} is less than the smallest size {widths[0]}")
    if solver == "milp":
        return _milp(costs, widths, room)
    if solver != "greedy":
        raise ValueError(f'solver must be "greedy" or "milp", got {solver!r}')
    return _greedy(costs, widths, room + 1e-9)


def _greedy(costs: np.ndarray, sizes: np.ndarray, room: float) -> list[int]:
    """Takes the best steps one after another; those that surely fit, all at once."""
    num_items, num_choices = costs.shape
    # The best steps of an item lead along the lower convex hull of its costs.
    hull = costs.astype(float)
    for i, j in itertools.combinations(range(num_choices), 2):
        for k in range(i + 1, j):
            share = (sizes[k] - sizes[i]) / (sizes[j] - sizes[i])
            hull[:, k] = np.minimum(hull[:, k], costs[:, i] * (1 - share) + costs[:, j] * share)
    steps = np.diff(sizes)
    # Rounding must not let a later step of an item go before an earlier one.
    gains = np.minimum.accumulate(-np.diff(hull, axis=1) / steps, axis=1)
    order = np.argsort(-gains, axis=None, kind="stable")
    order = order[gains.ravel()[order] > 0]
    items, taken = np.divmod(order, num_choices - 1)
    fits = num_items * sizes[0] + np.cumsum(steps[taken]) <= room
    # A step in the midst of a hull's edge is only a part of one: end before an edge that is cut.
    choice = np.bincount(items[fits], minlength=num_items)
    corners = np.where(np.isclose(hull, costs, rtol=1e-12, atol=0), np.arange(num_choices), 0)
    choice = np.maximum.accumulate(corners, axis=1)[np.arange(num_items), choice]
    left = room - sizes[choice].sum()
    while True:
        size = sizes - sizes[choice][:, None]
        saved = costs[np.arange(num_items), choice][:, None] - costs
        better = (size > 0) & (size <= left) & (saved > 0)
        if not better.any():
            return choice.tolist()
        rate = np.divide(saved, size, out=np.full_like(saved, -1.0), where=better)
        item, new = np.unravel_index(rate.argmax(), rate.shape)
        left -= size[item, new]
        choice[item] = new


def _milp(costs: np.ndarray, sizes: np.ndarray, room: float) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_items, num_choices = costs.shape
    one_each = np.kron(np.eye(num_items), np.ones(num_choices))
    found = milp(
        costs.ravel() / np.abs(costs).max(),
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.tile(sizes, num_items)[None], -np.inf, room + 1e-9),
        ],
    )
    assert found.x is not None, found.message  # the smallest choices always fit
    return found.x.reshape(costs.shape).argmax(1).tolist()
