# SPDX-License-Identifier: Apache-2.0
"""Costs of bits: the paper's, and measured ones."""

import numpy as np

from kvq_jax.fitting.allocation import allocate
from kvq_jax.fitting.costs import measured_costs, norm_costs

BITS = (2, 4, 8)


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
