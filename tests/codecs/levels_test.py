# SPDX-License-Identifier: Apache-2.0
"""Tables of levels against published numbers."""

import numpy as np
import pytest

from kvq_jax import codecs

# QLoRA, arXiv 2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
# Max, Quantizing for minimum distortion, IRE Transactions 1960, table I, and the levels' error.
LLOYD_MAX = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


def test_normal_float_is_qlora_s():
    np.testing.assert_allclose(codecs.normal_float(4), NF4, atol=2e-6)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_lloyd_max_is_max_s(bits):
    positive, error = LLOYD_MAX[bits]
    levels = np.array(codecs.lloyd_max(bits))
    np.testing.assert_allclose(levels[len(positive) :], positive, atol=1e-3)
    x = np.random.default_rng(0).standard_normal(1 << 18)
    nearest = levels[np.abs(x[:, None] - levels).argmin(1)]
    np.testing.assert_allclose(np.square(x - nearest).mean(), error, rtol=0.02)


def test_dynamic_exponent_spends_bits_on_the_exponent_or_the_fraction():
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    expected = [*(-x for x in positive[-2::-1]), 0.0, *positive]
    np.testing.assert_allclose(codecs.dynamic_exponent(4), expected)


@pytest.mark.parametrize(
    "make",
    [codecs.symmetric, codecs.normal_float, codecs.dynamic_exponent, codecs.lloyd_max],
    ids=lambda x: x.__name__,
)
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_levels_ascend_and_fill_their_bits(make, bits):
    levels = make(bits)
    assert len(levels) == 2**bits - (make is codecs.symmetric)
    assert (np.diff(levels) > 0).all()
    if make is not codecs.lloyd_max:
        assert 0.0 in levels and max(levels) == 1.0


def test_one_bit_has_no_symmetric_levels():
    with pytest.raises(ValueError, match="at least 2 bits, got 1"):
        codecs.symmetric(1)
