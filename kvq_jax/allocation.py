# SPDX-License-Identifier: Apache-2.0
"""Sharing out a budget of bits among tensors that suffer differently from few."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvq_jax.calibration import record
from kvq_jax.codecs.base import Codec
from kvq_jax.methods import kivi
from kvq_jax.models import Decoder


def norm_costs(decoder: Decoder, bits: Sequence[int]) -> Float[np.ndarray, "L 2 choices"]:
    """Returns what bits of each layer's keys and values cost by the norms of their projections.

    The square of the Frobenius norm over 4**bits, as the paper has it; needs no data.
    """
    norms = [
        [jnp.linalg.norm(projection.kernel[...]) for projection in (x.k_proj, x.v_proj)]
        for x in (layer.attention for layer in decoder.layers)
    ]
    return np.square(np.asarray(norms))[..., None] * 0.25 ** np.asarray(bits, float)


def measured_costs(
    decoder: Decoder, windows: Int[np.ndarray, "n T"], bits: Sequence[int], group_size: int = 32
) -> Float[np.ndarray, "L 2 choices"]:
    """Returns what bits of each layer's keys and values cost by the errors that texts show.

    Squared errors, each by the squared gradient of the loss with respect to that number: what they
    add to the loss, to second order, if they don't depend on each other.

    Args:
      decoder: the model.
      windows: token ids, a window of text a row; whole groups.
      bits: choices.
      group_size: of the codes.
    """
    costs = np.zeros((len(decoder.layers), 2, len(bits)))
    for window in windows:
        recorded = record(decoder, jnp.asarray(window)[None], pre_rope=False, gradients=True)
        for layer, (k, v, slope_k, slope_v) in enumerate(recorded):
            for i, number in enumerate(bits):
                method = kivi(bits=number, value_bits=number, group_size=group_size)
                costs[layer, 0, i] += _error(k, slope_k, group_size, method.key_codec)
                costs[layer, 1, i] += _error(v, slope_v, group_size, method.value_codec)
    return costs


def _error(x: jax.Array, slope: jax.Array, group_size: int, codec: Codec) -> float:
    x, slope = (y.reshape(*y.shape[:2], -1, group_size, y.shape[-1]) for y in (x, slope))
    error = codec.decode(codec.encode(x), jnp.float32) - x
    return float(jnp.square(slope * error).sum())


def allocate(
    costs: Float[np.ndarray, "n choices"],
    sizes: Sequence[int],
    budget: float | int,
    solver: Literal["greedy", "milp"] = "milp",
) -> list[int]:
    """Returns a choice for each item, of small total cost within a budget of size.

    Args:
      costs: of each item's choices, such as the error that so many bits leave.
      sizes: of the choices, ascending, the same for all items.
      budget: the most that the mean size may be.
      solver: "greedy" gives what is left to the step up that saves the most for its size, over and
        over; "milp" finds the best choice of all, by SciPy.

    Raises:
      ValueError: if even the smallest sizes exceed the budget.
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
    choice = np.zeros(num_items, int)
    while True:
        gains = {
            (i, c): (costs[i, choice[i]] - costs[i, c]) / (widths[c] - widths[choice[i]])
            for i in range(num_items)
            for c in range(choice[i] + 1, num_choices)
            if widths[choice].sum() + widths[c] - widths[choice[i]] <= room + 1e-9
        }
        if not gains:
            return choice.tolist()
        item, new = max(gains, key=gains.__getitem__)
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
