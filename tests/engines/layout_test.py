# SPDX-License-Identifier: Apache-2.0
"""A cache is the same whatever the layout of its codes in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import TypeCheckError

import kvq_jax as kvq
from kvq_jax.codecs import AffineCode
from kvq_jax.kernels.decode_attention import hopper, tpu

METHODS = {
    "ott": kvq.ott(group_size=32, residual_length=16),
    "kivi-K4V2": kvq.kivi(bits=4, value_bits=2, group_size=64, residual_length=32),
    "kivi-g128": kvq.kivi(bits=8, group_size=128, value_group_size=32, residual_length=0),
    "squat": kvq.squat(group_size=32, residual_length=16),
}


LAYOUTS = {"plain": AffineCode, "hopper": hopper.TileCode, "tpu": tpu.TpuCode}


def by_position(kv):
    """Keys and values in the order of their tokens, where a head has no token 0."""
    slots = jnp.where(kv.mask, kv.positions, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(slots, -1)
    count = int(kv.mask.sum(-1).max())

    def take(x):
        x = jnp.where(kv.mask[..., None], x, 0)
        return np.asarray(jnp.take_along_axis(x, order[..., None], 2)[:, :, :count])

    return take(kv.keys), take(kv.values)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_layouts_hold_the_same(method):
    spec = kvq.CacheSpec(2, 2, 700, 64, jnp.bfloat16)
    shape = (2, 2, 600, 2, 64)
    k, v = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), jnp.bfloat16)
    q = k[:, :1].repeat(2, 2)
    reads, outs = [], []
    for layout, code in LAYOUTS.items():
        cache = dataclasses.replace(method, layout=layout)
        state = cache.init(spec)
        assert isinstance(state.coded.keys, code)
        assert cache.capacity(state) >= spec.capacity
        lengths = jnp.array([400, 90])
        state = jax.jit(cache.prefill)(state, k[:, :400], v[:, :400], lengths=lengths)
        append = jax.jit(cache.append)
        for start in range(400, 600, 50):
            state = append(state, k[:, start : start + 50], v[:, start : start + 50])
        reads.append(by_position(jax.jit(cache.read)(state)))
        attend = jax.jit(cache.attend, static_argnames="implementation")
        outs.append(np.asarray(attend(state, q, implementation="reference"), np.float32))
    with pltpu.force_tpu_interpret_mode():
        outs.append(np.asarray(attend(state, q, implementation="mosaic_tpu"), np.float32))
    for read, out in zip(reads[1:], outs[1:], strict=False):
        jax.tree.map(np.testing.assert_array_equal, reads[0], read)
        np.testing.assert_allclose(outs[0], out, rtol=0, atol=2**-8)
    np.testing.assert_allclose(outs[0], outs[-1], rtol=0, atol=2**-7)


@pytest.mark.parametrize("layout", ["hopper", "tpu"])
def test_a_layout_that_can_not_hold_the_codes_is_refused(layout):
    method = dataclasses.replace(kvq.kivi(), layout=layout)
    with pytest.raises(ValueError, match=r"head_dim must be one of .* not 32"):
        method.init(kvq.CacheSpec(1, 1, 1024, 32))
    method = dataclasses.replace(kvq.kivi(bits=3), layout="hopper")
    with pytest.raises(ValueError, match=r"codes must be of \(2, 4, 8\) bits, not 3"):
        method.init(kvq.CacheSpec(1, 1, 1024, 64))
    with pytest.raises((ValueError, TypeCheckError), match="paged"):
        dataclasses.replace(method, layout="paged")
