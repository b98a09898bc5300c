# SPDX-License-Identifier: Apache-2.0
"""Layers of different methods: each as it is alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.engines import Layered
from kvq_jax.models import DecoderConfig, init_states

SIZES = {"group_size": 32, "residual_length": 16}
BITS, VALUE_BITS = (2, 4, 2), (2, 8, 2)
METHOD = kvq.adaquant(bits=BITS, value_bits=VALUE_BITS, **SIZES)
SPEC = kvq.CacheSpec(2, 2, 256, 64, jnp.float32)


def tokens():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, 150, 2, 64)), jnp.float32) for _ in range(2)]


def test_each_layer_is_kept_as_its_method_would():
    k, v = tokens()
    assert len(METHOD.methods) == 2
    states = [METHOD.init(SPEC, layer) for layer in range(3)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[2])
    assert jax.tree.structure(states[0]) != jax.tree.structure(states[1])
    assert METHOD.init(SPEC).kind == 0
    for layer, state in enumerate(states[:2]):
        alone = kvq.kivi(bits=BITS[layer], value_bits=VALUE_BITS[layer], **SIZES)
        ours = jax.jit(METHOD.prefill)(state, k[:, :100], v[:, :100])
        ours = jax.jit(METHOD.append)(ours, k[:, 100:], v[:, 100:])
        theirs = jax.jit(alone.prefill)(alone.init(SPEC), k[:, :100], v[:, :100])
        theirs = jax.jit(alone.append)(theirs, k[:, 100:], v[:, 100:])
        assert kvq.nbytes(ours) == kvq.nbytes(theirs)
        assert METHOD.capacity(ours) == alone.capacity(theirs)
        assert (ours.length == 150).all()
        jax.tree.map(np.testing.assert_array_equal, METHOD.read(ours), alone.read(theirs))
        np.testing.assert_array_equal(METHOD.attend(ours, k[:, :1]), alone.attend(theirs, k[:, :1]))
    swapped = kvq.select_rows(ours, jnp.array([1, 0]))
    np.testing.assert_array_equal(METHOD.read(swapped).keys[0], METHOD.read(ours).keys[1])


@functools.partial(jax.jit, static_argnames="ahead")
def step(states, k, v, ahead):
    cache = METHOD
    if ahead:
        states, cache = METHOD.make_room(states, k.shape[1])
    return tuple(cache.append(state, k, v) for state in states)


def test_room_made_ahead_changes_nothing():
    k, v = tokens()
    prefill = jax.jit(METHOD.prefill)
    start = tuple(prefill(METHOD.init(SPEC, i), k, v) for i in range(3))
    states = {False: start, True: start}
    for i in range(60):
        for ahead in states:
            states[ahead] = step(states[ahead], k[:, i : i + 1], v[:, i : i + 1], ahead)
    for ours, theirs in zip(states[True], states[False], strict=True):
        jax.tree.map(np.testing.assert_array_equal, METHOD.read(ours), METHOD.read(theirs))


def test_of_one_pair_of_widths_it_is_kivi():
    assert kvq.adaquant(bits=2, value_bits=4, **SIZES) == kvq.kivi(bits=2, value_bits=4, **SIZES)


def test_refuses_what_can_not_be_mixed():
    for others, message in (
        ((kvq.cq(),), "must need neither texts nor rope"),
        ((kvq.kivi(), kvq.kivi(group_size=64)), "in the same groups"),
    ):
        with pytest.raises(ValueError, match=message):
            Layered(others, (0,))
    with pytest.raises(ValueError, match="bits must be of all layers or of each"):
        kvq.adaquant(bits=(2, 4), value_bits=2)


def test_each_layer_of_a_model_must_have_a_method():
    config = DecoderConfig(64, 32, 2, 4, 2, 64, 48, 256, 1e-5, 1e4)
    for bits in ((2, 4, 8), (2, 4)):
        method = kvq.adaquant(bits=bits, value_bits=bits)
        layers = 30 if len(bits) == 2 else 2
        deep = dataclasses.replace(config, num_layers=layers)
        message = f"is for {len(bits)} layers, the model has {layers}"
        with pytest.raises(ValueError, match=message):
            init_states(deep, method, 1, 64)
    with pytest.raises(ValueError, match="layer 2 has no method: there are 2"):
        method.init(SPEC, layer=2)
