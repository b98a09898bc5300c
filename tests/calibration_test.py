# SPDX-License-Identifier: Apache-2.0
"""Calibration: what is recorded, what it is good for, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import calibration, measure
from kvq_jax.models import init_states, load_decoder
from kvq_jax.models.layers import apply_rope, rope_frequencies

FOLDERS = Path(__file__).parent / "models" / "golden" / "families"
SIZES = {"group_size": 32, "residual_length": 0}
CQ = kvq.cq(channels=2, bits=4, iterations=3, **SIZES)


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(FOLDERS / "llama")


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 128, (6, 96)).astype(np.int32)


@pytest.fixture(scope="module")
def fitted(decoder, windows):
    return kvq.calibrate(decoder, windows, CQ, num_tokens=300)


def test_what_is_recorded_is_what_a_cache_gets(decoder, windows):
    tokens = jnp.asarray(windows[:1])
    states = init_states(decoder.config, kvq.dense(), 1, 96, jnp.float32)
    _, states = decoder(tokens, states, kvq.dense())
    positions = jnp.arange(96)[None]
    for method in (CQ, kvq.svdq(fits="texts", **SIZES)):
        for recorded, state in zip(
            calibration.record(decoder, tokens, True, method.needs_weights), states, strict=True
        ):
            k = recorded[0].swapaxes(1, 2)
            k = apply_rope(k, positions, rope_frequencies(decoder.config)).swapaxes(1, 2)
            np.testing.assert_allclose(k, state.keys, atol=1e-5)
            np.testing.assert_allclose(recorded[1], state.values, atol=1e-5)
            assert len(recorded) == (4 if method.needs_weights else 2)


def test_weights_are_squared_gradients(decoder, windows):
    """By differences of the loss, with one number of a key or value moved."""
    tokens, at, step = jnp.asarray(windows[:1, :24]), (0, 1, 5, 3), 0.1
    recorder = calibration._Recorder(True, tuple(rope_frequencies(decoder.config).tolist()))

    def loss(layer, field, by):
        states = list(init_states(decoder.config, recorder, 1, 24, jnp.float32))
        moved = getattr(states[layer], field).at[at].add(by)
        states[layer] = states[layer]._replace(**{field: moved})
        hidden, _ = decoder(tokens, tuple(states), recorder)
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).sum()

    recorded = calibration.record(decoder, tokens, True, True)
    for layer, field in ((0, "keys"), (0, "values"), (1, "values")):
        slope = (loss(layer, field, step) - loss(layer, field, -step)) / (2 * step)
        weight = recorded[layer][2 if field == "keys" else 3][at]
        np.testing.assert_allclose(weight, slope**2, rtol=0.02)
        assert weight > 1e-5, "nothing was tested"


def test_fits_each_layer_to_its_own(decoder, windows, fitted):
    assert len(fitted.params) == decoder.config.num_layers
    assert fitted.about["texts"]["tokens"] == 300
    first, second = (layer[0] for layer in fitted.params[:2])
    assert np.isfinite(first).all() and np.abs(first - second).max() > 0.01
    skipped = [sorted({*range(96)} - {0})] * 6  # all but the first token of each window
    everything = kvq.calibrate(decoder, windows, kvq.svdq(fits="texts", **SIZES), num_tokens=9999)
    keys = [
        calibration.record(decoder, jnp.asarray(w[None]), True, False)[0][0][0] for w in windows
    ]
    keys = jnp.concatenate([k[:, i] for k, i in zip(keys, map(jnp.array, skipped), strict=True)], 1)
    mean = everything.params[0][0][0]
    expected = keys.swapaxes(0, 1).reshape(keys.shape[1], -1).mean(0)
    np.testing.assert_allclose(mean[0, 0], expected, atol=1e-5)


def test_cache_of_fitted_codes_predicts_as_the_dense_one(decoder, windows, fitted):
    quality = measure.evaluate(
        decoder, windows[:1], {"cq": CQ}, skip=40, params={"cq": fitted.params}
    )["cq"]
    assert 0 < quality.kl < 0.05


def test_generates_twice_from_one_calibration(decoder, fitted):
    first, second = (
        kvq.generate(decoder, [[1, 2, 3] * 20], method=CQ, params=fitted.params, max_new_tokens=8)
        for _ in range(2)
    )
    assert first.tokens == second.tokens


def test_saves_and_loads(decoder, fitted, tmp_path):
    kvq.save_calibration(tmp_path / "cq", fitted)
    method = kvq.cq(channels=2, bits=4, iterations=3, group_size=64, residual_length=32)
    loaded = kvq.load_calibration(tmp_path / "cq", method, decoder.config)
    assert loaded.about == fitted.about
    jax.tree.map(np.testing.assert_array_equal, loaded.params, fitted.params)
    with pytest.raises(ValueError, match="was fitted for the method"):
        kvq.load_calibration(tmp_path / "cq", kvq.cq(channels=4), decoder.config)
    other = load_decoder(FOLDERS / "qwen3_qk_norm").config
    with pytest.raises(ValueError, match="was fitted for the model"):
        kvq.load_calibration(tmp_path / "cq", CQ, other)


def test_refuses_what_does_not_fit(decoder, windows, fitted):
    with pytest.raises(ValueError, match="fits nothing to texts"):
        kvq.calibrate(decoder, windows, kvq.kivi())
    with pytest.raises(ValueError, match="takes windows of token ids, not texts"):
        kvq.calibrate(decoder, ["some text"], CQ)
    with pytest.raises(ValueError, match=r"needs parameters: kvq_jax\.calibrate makes them"):
        kvq.generate(decoder, [[1, 2]], method=CQ)
    with pytest.raises(ValueError, match="cq needs parameters"):
        measure.evaluate(decoder, windows, {"cq": CQ}, skip=8)
    spec = kvq.CacheSpec(1, 1, 64, 32, rope=(1.0,) * 16)
    with pytest.raises(ValueError, match="do not fit a cache of"):
        CQ.with_params(CQ.init(spec), fitted.params[0])
    for method in (kvq.dense(), kvq.kivi()):
        with pytest.raises(ValueError, match="has no parameters"):
            method.with_params(method.init(spec), fitted.params[0])


def test_a_cache_without_its_parameters_is_loud():
    spec = kvq.CacheSpec(1, 1, 64, 32, jnp.float32, rope=(1.0,) * 16)
    k = jax.random.normal(jax.random.key(0), (1, 70, 1, 32))
    state = CQ.append(CQ.init(spec), k[:, :64], k[:, :64])
    assert jnp.isnan(CQ.attend(state, k[:, :1])).all()
