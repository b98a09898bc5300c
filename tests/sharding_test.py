# SPDX-License-Identifier: Apache-2.0
"""KV heads on several devices: the same results, and no communication but the model's own."""

import collections
import dataclasses
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import kvq_jax as kvq
from kvq_jax import fits
from kvq_jax.base import nbytes
from kvq_jax.models.shapes import SHAPES

TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, kvq_jax as kvq
from jax.sharding import NamedSharding
from kvq_jax.codecs.base import Sample

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
k, v, q = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 150, 4, 32), np.float32))
ones = jnp.ones((1, 150), bool)
for method in (kvq.ott(group_size=32), kvq.dense(), kvq.cq(iterations=3)):
    sharded = kvq.Sharded(method)
    assert sharded.pre_rope == method.pre_rope and sharded.needs_prompt == method.needs_prompt
    rope = tuple(0.5**i for i in range(16)) if method.pre_rope else None
    spec = kvq.CacheSpec(2, 4, 256, 32, jnp.float32, rope)
    place = jax.tree.map(lambda s: NamedSharding(mesh, s), sharded.partition_specs(spec))
    outs = []
    with jax.set_mesh(mesh):
        for cache in (method, sharded):
            state = cache.init(spec)
            if cache.needs_texts:
                sample = [Sample(x[:1], ones) for x in (k, v)]
                state = cache.with_params(state, method.calibrate(*sample))
            if cache is sharded:
                state = jax.device_put(state, place)
            prompt = k[:, :140], v[:, :140]
            lengths = jnp.array([100, 140])
            state = jax.jit(cache.prefill)(state, *prompt, q=q[:, :140], lengths=lengths)
            for i in range(140, 150):
                state = jax.jit(cache.append)(state, k[:, i : i + 1], v[:, i : i + 1])
            if cache is sharded:
                for x, s in zip(*map(jax.tree.leaves, (state, place)), strict=True):
                    assert x.sharding.is_equivalent_to(s, x.ndim), (x.shape, x.sharding)
            outs.append((jax.jit(cache.attend)(state, q[:, -1:]), cache.read(state).mask.sum()))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), *outs)
print("the same")
"""


def test_heads_on_two_devices_are_the_same():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment,
    )
    assert run.stdout == "the same\n", run.stderr


def test_the_axis_of_the_heads_is_found():
    spec = kvq.CacheSpec(3, 2, 1024, 64, jnp.bfloat16)
    state = kvq.Sharded(kvq.ott()).partition_specs(spec)
    heads = PartitionSpec(None, "heads")
    assert state.keys == state.values == state.coded.keys.words == heads
    assert set(state.pool) == {heads}
    assert state.length == state.coded.block_table == state.coded.num_coded == PartitionSpec()

    spec = dataclasses.replace(spec, rope=(1.0,) * 32)
    state = kvq.Sharded(kvq.kvquant()).partition_specs(spec)
    levels, *ranges = state.fitted.key_codec.value  # one table for all heads, ranges of each
    assert ranges == [heads, heads]
    assert levels == state.rope == PartitionSpec()


def test_what_heads_share_is_refused():
    for method in (kvq.ott(share_heads=True), kvq.decoquant(), kvq.svdq()):
        with pytest.raises(ValueError, match="share outliers or a fit"):
            kvq.Sharded(method)
    with pytest.raises(ValueError, match="share out the methods of the layers"):
        kvq.Sharded(kvq.adaquant(bits=(2, 4), value_bits=(2, 2)))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="libtpu is for x86-64 Linux"
)
def test_a_step_on_four_tpus_sums_where_it_must_and_copies_nothing():
    config = dataclasses.replace(SHAPES["llama-3-8b"], num_layers=2)
    step = fits.Step(config, kvq.ott(), 32768, num_devices=4)
    compiled = step.compile_for("v5e")
    collectives = collections.Counter(
        re.findall(
            r" (all-\w+|reduce-scatter|collective-\w+|all-to-all)(?:-start)?\(", compiled.hlo
        )
    )
    # After the embedding, and twice a layer.
    assert collectives == {"all-reduce": 1 + 2 * config.num_layers}
    assert compiled.hlo.count('custom_call_target="tpu_custom_call"') == config.num_layers
    assert compiled.alias_bytes >= nbytes(step.states) / 4  # the cache, in place
    assert compiled.temp_bytes < nbytes(step.states) / 4 / 4
