# SPDX-License-Identifier: Apache-2.0
"""Which tokens each filter lets through, how often they are drawn, and what a draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.decoding.sampling import Sampling, per_row, sample

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.08, 0.15])
DRAWS = 4000
jitted = jax.jit(sample)


def draws(logits, sampling, seed=0):
    """Draws of one row, by as many rows of a batch."""
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    return jitted(logits, per_row(sampling, seed, DRAWS), jnp.zeros(DRAWS, jnp.int32))


def frequencies(sampling):
    return np.bincount(draws(np.log(PROBABILITIES), sampling), minlength=6) / DRAWS


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_k=100), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=2**40), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_p=0.39), [1]),
        (Sampling(temperature=1.0, top_p=0.41), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.7), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.8), [1, 3, 5]),
        (Sampling(temperature=1.0, top_p=1e-50), [1]),
        (Sampling(temperature=1.0, top_p=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, min_p=0.3), [1, 3, 5]),
        (Sampling(temperature=1.0, min_p=1.0), [1]),
        (Sampling(temperature=1.0, min_p=0.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.9, min_p=0.5), [1, 3]),
        # top_p is of what top_k has kept: of .4 and .3, .4 alone is more than half.
        (Sampling(temperature=1.0, top_k=2, top_p=0.55), [1]),
        (Sampling(temperature=1.0, top_p=0.55), [1, 3]),
        (Sampling(), [1]),
        (Sampling(temperature=1e-40), [1]),
        (Sampling(temperature=1e-30, top_k=3, top_p=0.9, min_p=0.1), [1]),
    ],
)
def test_filters(sampling, kept):
    expected = np.zeros(6)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    found = frequencies(sampling)
    # Four standard deviations of a share of 4000 draws.
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS)).all()


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        found = frequencies(Sampling(temperature=temperature))
        assert np.abs(found - expected / expected.sum()).max() < 0.04
    assert np.abs(frequencies(Sampling(1e300)) - 1 / 6).max() < 0.04


@pytest.mark.parametrize(
    "logits, settings, kept",
    [
        ([1, 5, 5, 0], {"top_k": 1}, [1]),
        ([1, 2, 2, 2, 3], {"top_k": 3}, [1, 2, 4]),
        (np.log([0.4, 0.3, 0.3, 1e-9]), {"top_k": 2}, [0, 1]),
        (np.zeros(10), {"top_p": 0.5}, [0, 1, 2, 3, 4]),
        (np.zeros(10), {"top_p": 0.51}, [0, 1, 2, 3, 4, 5]),
        (np.log([0.4, 0.3, 0.3, 1e-9]), {"top_p": 0.5}, [0, 1]),
        (np.log([0.25, 0.25, 0.5]), {"top_p": 0.75}, [0, 2]),
        ([-1.0, -0.0, 0.0], {"top_k": 1}, [1]),
        ([-3.0, -2.0, -2.0], {"top_k": 1}, [1]),
    ],
)
def test_ties_go_to_the_lowest_ids(logits, settings, kept):
    assert sorted(set(draws(logits, Sampling(1.0, **settings)).tolist())) == kept


def test_filters_are_those_of_a_sort(getkey):
    """On many tokens with many ties, against the definition in NumPy."""
    logits = np.round(4 * np.asarray(jax.random.normal(getkey(), (6, 500)))) / 4
    sampling = [
        Sampling(0.7, top_k, top_p, min_p)
        for top_k, top_p, min_p in [
            (40, None, None), (None, 0.9, None), (None, None, 0.02), (60, 0.8, 0.01), (1, 0.5, 1.0),
            (None, None, None),
        ]
    ]  # fmt: skip
    counts = np.zeros((6, 500), int)
    for seed in range(600):
        drawn = jitted(jnp.asarray(logits), per_row(sampling, seed, 6), jnp.zeros(6, jnp.int32))
        counts[np.arange(6), drawn] += 1
    for row, settings in enumerate(sampling):
        scaled = logits[row].astype(float) / settings.temperature
        order = np.argsort(-scaled, stable=True)[: settings.top_k]
        weight = np.exp(scaled[order])
        before = np.cumsum(weight) - weight
        kept = before < (settings.top_p or 2) * weight.sum()
        kept &= weight >= (settings.min_p or 0) * weight[0]
        expected = np.zeros(500)
        expected[order[kept]] = weight[kept] / weight[kept].sum()
        assert (counts[row][expected == 0] == 0).all()
        # The expected total variation of 600 draws from n tokens is below sqrt(n / 600) / 2.
        distance = np.abs(counts[row] / 600 - expected).sum() / 2
        assert distance < 1.2 * np.sqrt(kept.sum() / 600) / 2


def test_a_draw_depends_on_its_own_row_alone(getkey):
    """Not on its place, on the batch, or on settings of other rows, which take other branches."""
    logits = jax.random.normal(getkey(), (4, 300))
    settings = [Sampling(1.5), Sampling(), Sampling(0.8, top_p=0.9), Sampling(1.2, 5, None, 0.1)]
    seeds, index = [3, 2**63 + 3, 3, 5], np.array([0, 7, 7, 1], np.int32)

    def run(rows, settings=settings):
        rows = np.array(rows)
        chosen = per_row([settings[i] for i in rows], [seeds[i] for i in rows], len(rows))
        return jitted(logits[rows], chosen, jnp.asarray(index[rows])).tolist()

    together = run([0, 1, 2, 3])
    assert together == [run([row])[0] for row in range(4)]
    assert run([3, 1, 0, 2]) == [together[i] for i in (3, 1, 0, 2)]


def test_seeds_and_steps_draw_independently():
    flat = jnp.zeros((3, 10**5))

    def run(seed, index):
        return jitted(flat, per_row(Sampling(1.0), seed, 3), jnp.full(3, index)).tolist()

    assert run(4, 0)[0] == run([4, 5, 6], 0)[0] == run([1, 1, 4], 0)[2]
    found = [x for seed in (0, 1, 2**32, 2**64 - 1) for step in (0, 1) for x in run(seed, step)]
    assert len(set(found)) == 24


def test_settings_come_in_any_form_and_compile_once(as_users_run_it):
    fields = dict(temperature=[0.5, 1.0], top_k=[None, 3], top_p=None, min_p=0.25)
    rows = [Sampling(0.5, None, None, 0.25), Sampling(1.0, 3, None, 0.25)]
    arrays = {k: v if k == "top_k" else np.array(v) for k, v in fields.items() if v is not None}
    expected = per_row(rows, [1, 2], 2)
    logits, zero = jnp.ones((2, 9)), jnp.zeros(2, jnp.int32)
    step = jax.jit(lambda *args: sample(*args))  # with a cache of its own
    for sampling, seed in ((Sampling(**fields), np.array([1, 2])), (Sampling(**arrays), (1, 2))):
        made = per_row(sampling, seed, 2)
        for got, want in zip(*map(jax.tree.leaves, (made, expected)), strict=True):
            assert got.dtype == want.dtype
            assert (got == want).all()
        step(logits, made, zero)
    for sampling in (Sampling([0.4, 2.0], top_p=[0.3, None]), Sampling(0.7, top_k=2, min_p=0.1)):
        step(logits, per_row(sampling, 7, 2), zero)
    assert step._cache_size() == 1, "what filters"
    for sampling in (None, Sampling(0.3), Sampling([0.0, 2.0]), Sampling(0.0, top_p=0.5)):
        step(logits, per_row(sampling, 7, 2), zero)
    assert step._cache_size() == 3, "what draws without filters, and what doesn't draw"
    assert hash(Sampling(**fields)) == hash(Sampling((0.5, 1.0), (None, 3), None, 0.25))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"temperature": [0.5, -1.0]},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": [None, 0]},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": np.array([0.5, 1.5])},
        {"min_p": -0.1},
        {"min_p": 2.0},
    ],
)
def test_bad_settings_are_refused(options, as_users_run_it):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*, got "):
        Sampling(**options)


@pytest.mark.parametrize(
    "sampling, seed, message",
    [
        (Sampling([0.5, 1.0, 2.0]), 0, "temperature has 3 entries for 2 prompts"),
        ([Sampling()], 0, "sampling has 1 entries for 2 prompts"),
        ([Sampling(), 0.5], 0, r"a Sampling or one for each row, got 0\.5"),
        ([Sampling(), Sampling([1.0, 2.0])], 0, r"one number, got \(1\.0, 2\.0\)"),
        (0.7, 0, r"sampling must be a Sampling or one for each row, got 0\.7"),
        (None, [1], "seed has 1 entries for 2 prompts"),
        (None, -1, r"seed must be an integer from 0 to 2\*\*64 - 1, got -1"),
        (None, [1, 2**64], "seed must be an integer"),
        (None, 0.5, r"seed must be an integer .* got 0\.5"),
        (None, "abc", "seed must be an integer .* got 'abc'"),
    ],
)
def test_what_is_not_one_a_row_is_refused(sampling, seed, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        per_row(sampling, seed, 2)
