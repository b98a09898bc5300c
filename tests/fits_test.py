# SPDX-License-Identifier: Apache-2.0
"""The arithmetic around the compiler's answer; `cli/fits_test.py` asks the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import kvq_jax
from kvq_jax import aot, fits
from kvq_jax.base import nbytes
from kvq_jax.models import Decoder, DecoderConfig, init_states
from kvq_jax.models.shapes import SHAPES

LLAMA = SHAPES["llama-3-8b"]
WEIGHTS = 2 * 8_030_261_248
GIB = 2**30


@pytest.fixture
def answer(monkeypatch):
    """Returns a function that makes the compiler say how many bytes are required."""

    def let(chip, required, method=None):
        def compile_for(chip, *_, **__):
            if required <= aot.CHIPS[chip].hbm_bytes:
                return aot.Compiled(
                    chip, 1, 0, 0, 0, 0, 0, peak_bytes=required, seconds=1.0, hlo=""
                )
            raise aot.DoesNotFit("no", required, aot.CHIPS[chip].hbm_bytes)

        monkeypatch.setattr(aot, "compile_for", compile_for)
        return fits.fits(LLAMA, method or kvq_jax.ott(), chip, context=131072)

    return let


def cache_bytes(context):
    method = dataclasses.replace(kvq_jax.ott(), layout="tpu")
    return nbytes(jax.eval_shape(lambda: init_states(LLAMA, method, 1, context, jnp.bfloat16)))


def test_what_would_do_instead(answer):
    rest = 100 * 2**20
    fit = answer("v5e", WEIGHTS + cache_bytes(131072) + rest)
    assert not fit.fits
    assert fit.compiled is None
    assert (fit.weights_bytes, fit.cache_bytes) == (WEIGHTS, cache_bytes(131072))
    assert fit.larger_chips == ("v4", "v6e", "7x", "v5p")
    assert fit.max_context % fits.STEP == 0
    room = fits.MARGIN * fit.hbm_bytes - WEIGHTS - rest
    assert cache_bytes(fit.max_context) <= room < cache_bytes(fit.max_context + fits.STEP)
    assert fit.num_devices == 2


def test_where_it_fits_the_rest_grows_with_the_cache(answer):
    rest = 100 * 2**20
    fit = answer("v6e", WEIGHTS + cache_bytes(131072) + rest)
    assert fit.fits
    assert fit.larger_chips == ("7x", "v5p")
    factor = 1 + rest / cache_bytes(131072)
    room = fits.MARGIN * fit.hbm_bytes - WEIGHTS
    assert cache_bytes(fit.max_context) * factor <= room
    assert cache_bytes(fit.max_context + fits.STEP) * factor > room
    assert fit.num_devices == 1


def test_the_compiler_is_right(answer):
    fit = answer("v6e", aot.CHIPS["v6e"].hbm_bytes)
    assert fit.fits
    assert (fit.max_context, fit.num_devices) == (131072, 1)


def test_where_nothing_would_do(answer):
    fit = answer("v5e", WEIGHTS + 200 * GIB)
    assert (fit.larger_chips, fit.max_context, fit.num_devices) == ((), 0, None)


def test_keys_before_rope_and_layers_that_differ(answer):
    bits, sizes = (2, 4) * 16, {"group_size": 64, "residual_length": 32}
    mixed = kvq_jax.adaquant(bits=bits, value_bits=bits, **sizes)
    few, mean, many = (
        answer("v6e", WEIGHTS + 12 * GIB, method).cache_bytes
        for method in (kvq_jax.kivi(bits=2, **sizes), mixed, kvq_jax.kivi(bits=4, **sizes))
    )
    assert 2 * mean == few + many
    assert answer("v6e", WEIGHTS + 12 * GIB, kvq_jax.kvquant()).max_context >= 131072


def test_heads_that_share_a_basis_stay_on_one_chip(answer):
    for method, num_devices in ((kvq_jax.svdq(), None), (kvq_jax.cq(), 2)):
        assert answer("v5e", WEIGHTS + 8 * GIB, method).num_devices == num_devices


def test_the_step_is_that_of_generation(getkey):
    from flax import nnx

    from kvq_jax.decoding.steps import decode_step

    config = DecoderConfig(64, 32, 2, 4, 2, 16, 48, 256, 1e-5, 1e4)
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    method = kvq_jax.ott(group_size=32)
    tokens = jax.random.randint(getkey(), (3, 1), 0, 64)

    def states():
        return init_states(config, method, 3, 128)

    expected, _ = decode_step(decoder, method)(states(), tokens)
    logits, _ = fits.decode_step(
        config, method, jnp.float32, jax.tree.leaves(decoder), states(), tokens
    )
    assert (logits == expected).all()
