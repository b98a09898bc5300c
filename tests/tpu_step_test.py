# SPDX-License-Identifier: Apache-2.0
"""One whole decode step of an 8B model with the fused kernel, compiled for a TPU."""

import dataclasses
import platform
import sys

import pytest

import kvq_jax as kvq
from kvq_jax import fits
from kvq_jax.models.shapes import SHAPES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="libtpu is for x86-64 Linux"
)
LLAMA = SHAPES["llama-3-8b"]


def test_8b_with_32k_tokens_on_one_v5e():
    fit = fits.fits(LLAMA, kvq.ott(), "v5e", context=32768)
    assert fit.fits, f"needs {fit.required_bytes / 2**30:.2f} GiB"
    compiled = fit.compiled
    assert compiled.hlo.count('custom_call_target="tpu_custom_call"') == LLAMA.num_layers
    assert compiled.alias_bytes >= fit.cache_bytes
    # Handles of the weights' prefetches, 16 KiB each, some 60 a layer.
    assert compiled.temp_bytes < 1.1 * 2**20 * LLAMA.num_layers


def test_temporaries_do_not_grow_with_the_cache():
    config = dataclasses.replace(LLAMA, num_layers=2)
    short, long = (
        fits.fits(config, kvq.ott(), "v5e", context=n, batch_size=2) for n in (8192, 32768)
    )
    growth = long.compiled.temp_bytes - short.compiled.temp_bytes
    assert growth < 0.02 * (long.cache_bytes - short.cache_bytes)
