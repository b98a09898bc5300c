# SPDX-License-Identifier: Apache-2.0
"""Allocation: the best there is within the budget, and what it is good for."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from kvq_jax.allocation import allocate, measured_costs, norm_costs
from kvq_jax.models import load_decoder

FOLDER = Path(__file__).parent / "models" / "golden" / "families" / "llama"
BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(FOLDER)


def random_costs(seed, items=5):
    rng = np.random.default_rng(seed)
    return np.sort(rng.exponential(size=(items, 3)) * rng.exponential(size=(items, 1)), 1)[:, ::-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [2, 3.2, 4, 8])
def test_milp_finds_the_best_and_greedy_keeps_the_budget(seed, budget):
    costs, sizes = random_costs(seed), np.array(BITS)

    def total(choice):
        return costs[np.arange(5), choice].sum()

    fitting = [
        choice
        for choice in itertools.product(range(3), repeat=5)
        if sizes[list(choice)].mean() <= budget
    ]
    best = min(map(total, map(list, fitting)))
    np.testing.assert_allclose(total(allocate(costs, BITS, budget)), best)
    greedy = allocate(costs, BITS, budget, "greedy")
    assert sizes[greedy].mean() <= budget
    assert best - 1e-9 <= total(greedy) <= min(total([0] * 5), 3 * best + 1e-9)


def test_costs_do_not_depend_on_their_unit():
    costs = random_costs(0)
    for solver in ("greedy", "milp"):
        assert allocate(costs, BITS, 4, solver) == allocate(1e-9 * costs, BITS, 4, solver)


def test_norm_costs_are_the_paper_s(decoder):
    costs = norm_costs(decoder, BITS)
    kernel = np.asarray(decoder.layers[1].attention.v_proj.kernel[...])
    np.testing.assert_allclose(costs[1, 1], np.square(kernel).sum() / 4.0 ** np.array(BITS), 1e-5)


def test_measured_costs_fall_with_bits(decoder):
    windows = np.random.default_rng(0).integers(0, 128, (2, 64)).astype(np.int32)
    costs = measured_costs(decoder, windows, BITS)
    assert costs.shape == (2, 2, 3)
    assert (costs[..., :-1] > 5 * costs[..., 1:]).all()
    assert len(set(allocate(costs.reshape(4, 3), BITS, 4))) > 1


def test_refuses_what_can_not_be(as_users_run_it):
    for arguments, message in (
        ((BITS, 1.9), "a budget of 1.9 is less than the smallest"),
        (((4, 2, 8), 4), "sizes must ascend"),
        (((2, 4), 4), "sizes must ascend, one for each of 3"),
        ((BITS, 4, "best"), 'solver must be "greedy" or "milp"'),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            allocate(random_costs(0), *arguments)
