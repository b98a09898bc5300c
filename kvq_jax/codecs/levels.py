# SPDX-License-Identifier: Apache-2.0
"""Tables of levels, ascending, for a `Table` codec."""

import functools
import math
import statistics

import numpy as np

Levels = tuple[float, ...]


def symmetric(bits: int) -> Levels:
    """Returns 2**bits - 1 evenly spaced levels from -1 to 1, zero among them.

    Raises:
      ValueError: for 1 bit, whose only level would be zero.
    """
    most = 2 ** (bits - 1) - 1
    if most < 1:
        raise ValueError(f"symmetric levels need at least 2 bits, got {bits!r}")
    return tuple(i / most for i in range(-most, most + 1))


def normal_float(bits: int) -> Levels:
    """Returns the levels of NormalFloat: quantiles of a normal distribution, from -1 to 1.

    One of them is zero. The rest are half positive, half negative, but for the one more that is
    positive.

    References:
      QLoRA, arXiv 2305.14314, section 3; the quantiles as in its code.
    """
    half, most = 2 ** (bits - 1), 0.9677083  # the mean of 1 - 1/32 and 1 - 1/30
    ranks = [
        *np.linspace(1 - most, 0.5, half)[:-1].tolist(),
        *np.linspace(0.5, most, half + 1).tolist(),
    ]
    quantiles = [statistics.NormalDist().inv_cdf(rank) for rank in ranks]
    return tuple(x / max(map(abs, quantiles)) for x in quantiles)


def dynamic_exponent(bits: int) -> Levels:
    """Returns the levels of signed numbers whose exponent takes as many bits as it needs.

    After the sign come e zeros and a one, then a linear fraction f of the bits that are left:
    the number is ± 10**-e * f, f from 0.1 to 1. So small numbers have few digits and large ones
    many. Zero and 1 have codes of their own, in place of -0 and of the all-zero exponent.

    References:
      8-bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561, section 2.
    """
    positive = [1.0]
    for exponent in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (bits - 2 - exponent) + 1)
        positive += (10.0**-exponent * (edges[1:] + edges[:-1]) / 2).tolist()
    return tuple(sorted([0.0, *positive, *(-x for x in positive[1:])]))


@functools.cache
def lloyd_max(bits: int) -> Levels:
    """Returns the levels of least mean square error for a standard normal distribution.

    Each level is the mean of the numbers nearest to it (Lloyd's condition), to 1e-5.
    """
    # The best density of many levels is that of a normal distribution 3 times as wide in variance
    # (Panter and Dite); from there few steps are left.
    ranks = (np.arange(2**bits) + 0.5) / 2**bits
    start = statistics.NormalDist(0, math.sqrt(3))
    levels = np.array([start.inv_cdf(rank) for rank in ranks])
    change = np.inf
    while change > 1e-5:
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
        mass = np.diff([(1 + math.erf(x / math.sqrt(2))) / 2 for x in edges])
        means = (density[:-1] - density[1:]) / mass
        means = (means - means[::-1]) / 2  # symmetric as the distribution
        change = np.abs(means - levels).max()
        levels = means
    return tuple(levels.tolist())
