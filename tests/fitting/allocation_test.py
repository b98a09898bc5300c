# SPDX-License-Identifier: Apache-2.0
"""Allocation: the best there is within the budget, and what it is good for."""

import itertools

import numpy as np
import pytest

from kvq_jax.fitting.allocation import allocate

BITS = (2, 4, 8)


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


def test_refuses_what_can_not_be(as_users_run_it):
    for arguments, message in (
        ((BITS, 1.9), "a budget of 1.9 is less than the smallest"),
        (((4, 2, 8), 4), "sizes must ascend"),
        (((2, 4), 4), "sizes must ascend, one for each of 3"),
        ((BITS, 4, "best"), 'solver must be "greedy" or "milp"'),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            allocate(random_costs(0), *arguments)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_finds_the_best_of_what_saves_less_and_less(seed):
    rng = np.random.default_rng(seed)
    gains = -np.sort(-rng.exponential(size=(5, 3)), axis=1)  # convex: then no choice is better
    costs = 10 - np.pad(gains, ((0, 0), (1, 0))).cumsum(1)
    for budget in (0, 3, 7, 15, 20):
        best = min(
            costs[range(5), list(bits)].sum()
            for bits in itertools.product(range(4), repeat=5)
            if sum(bits) <= budget
        )
        bits = allocate(costs, range(4), budget / 5, "greedy")
        assert sum(bits) <= budget
        np.testing.assert_allclose(costs[range(5), bits].sum(), best)


def test_greedy_sees_past_a_bit_that_saves_little():
    costs = np.array([[9.0, 8.9, 1.0], [5.0, 3.0, 2.5]])
    assert allocate(costs, range(3), 0.5, "greedy") == [0, 1], "half of the best step is none"
    assert allocate(costs, range(3), 1, "greedy") == [2, 0]
    assert allocate(costs, range(3), 1.5, "greedy") == [2, 1]
    assert allocate(np.array([[3.0, 3.0, 3.0]]), range(3), 2, "greedy") == [0], "it saves nothing"


def one_step_after_another(costs, sizes, room):
    """The greedy rule as it reads."""
    choice = np.zeros(len(costs), int)
    while True:
        steps = [
            ((costs[i, choice[i]] - costs[i, c]) / (sizes[c] - sizes[choice[i]]), i, c)
            for i in range(len(costs))
            for c in range(choice[i] + 1, len(sizes))
            if sizes[choice].sum() + sizes[c] - sizes[choice[i]] <= room + 1e-9
        ]
        if not steps or max(steps)[0] <= 0:
            return choice.tolist()
        _, i, c = max(steps)
        choice[i] = c


@pytest.mark.parametrize("seed", range(20))
def test_greedy_takes_the_best_step_over_and_over(seed):
    rng = np.random.default_rng(seed)
    sizes = np.cumsum(rng.integers(1, 4, rng.integers(2, 6)))
    costs = rng.exponential(size=(rng.integers(1, 9), len(sizes)))
    budget = rng.uniform(sizes[0], sizes[-1] + 1)
    expected = one_step_after_another(costs, sizes, budget * len(costs))
    assert allocate(costs, sizes.tolist(), budget, "greedy") == expected
