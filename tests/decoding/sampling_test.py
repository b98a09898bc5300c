# SPDX-License-Identifier: Apache-2.0
"""Which tokens each filter lets through, and how often they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvq_jax.decoding.sampling import Sampling, sample

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.08, 0.15])
DRAWS = 4000


def frequencies(sampling, key):
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES).astype(jnp.float32), (DRAWS, 6))
    drawn = jax.jit(sample, static_argnums=1)(logits, sampling, key)
    return np.bincount(drawn, minlength=6) / DRAWS


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_k=100), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_p=0.39), [1]),
        (Sampling(temperature=1.0, top_p=0.41), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.8), [1, 3, 5]),
        (Sampling(temperature=1.0, top_p=1.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, min_p=0.3), [1, 3, 5]),
        (Sampling(temperature=1.0, min_p=1.0), [1]),
        (Sampling(temperature=1.0, min_p=0.0), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.9, min_p=0.5), [1, 3]),
        (Sampling(), [1]),
    ],
)
def test_filters(sampling, kept, getkey):
    expected = np.zeros(6)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    found = frequencies(sampling, getkey())
    # Four standard deviations of a share of 4000 draws.
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS)).all()


def test_temperature_sharpens_and_flattens(getkey):
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        found = frequencies(Sampling(temperature=temperature), getkey())
        assert np.abs(found - expected / expected.sum()).max() < 0.04


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
