# SPDX-License-Identifier: Apache-2.0
"""A small decoder and windows of token ids for it."""

from pathlib import Path

import numpy as np
import pytest

from kvq_jax.models import load_decoder

FAMILIES = Path(__file__).parents[1] / "models" / "golden" / "families"


@pytest.fixture(scope="session")
def decoder():
    return load_decoder(FAMILIES / "llama")


@pytest.fixture(scope="session")
def windows():
    return np.random.default_rng(0).integers(0, 128, (6, 96)).astype(np.int32)
