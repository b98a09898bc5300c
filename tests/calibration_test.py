# SPDX-License-Identifier: Apache-2.0
"""Calibration: what is recorded, what it is good for, and what is refused."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import calibration, measure
from kvq_jax.codecs.base import Sample
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
            calibration.record(
                decoder, tokens, pre_rope=True, gradients=method.needs_gradients, exact=5
            ),
            states,
            strict=True,
        ):
            k = recorded[0].swapaxes(1, 2)
            k = apply_rope(k, positions, rope_frequencies(decoder.config)).swapaxes(1, 2)
            np.testing.assert_allclose(k, state.keys, atol=1e-5)
            np.testing.assert_allclose(recorded[1], state.values, atol=1e-5)
            assert len(recorded) == (4 if method.needs_gradients else 2)


@pytest.mark.parametrize("exact", [0, 12])
def test_gradients_are_those_of_what_is_seen_from_far(decoder, windows, exact):
    """By differences of the loss, with one number of a key or value moved."""
    tokens, at, step = jnp.asarray(windows[:1, :24]), (0, 1, 5, 3), 0.1
    recorder = calibration._Recorder(exact, tuple(rope_frequencies(decoder.config).tolist()))

    def loss(layer, field, by):
        states = list(init_states(decoder.config, recorder, 1, 24, jnp.float32))
        moved = list(states[layer].added)
        moved[field] = moved[field].at[at].add(by)
        states[layer] = states[layer]._replace(added=tuple(moved))
        hidden, _ = decoder(tokens, tuple(states), recorder)
        log_p = jax.nn.log_softmax(decoder.logits(hidden[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).sum()

    recorded, all_of_it = (
        calibration.record(decoder, tokens, pre_rope=True, gradients=True, exact=n)
        for n in (exact, 0)
    )
    for layer, field in ((0, 0), (0, 1), (1, 1)):
        slope = (loss(layer, field, step) - loss(layer, field, -step)) / (2 * step)
        gradient = recorded[layer][2 + field][at]
        np.testing.assert_allclose(gradient, slope, rtol=0.02)
        assert abs(gradient) > 1e-3, "nothing was tested"
        assert exact == 0 or abs(gradient / all_of_it[layer][2 + field][at] - 1) > 0.05
    # The last query that the loss hangs on is at 22.
    for gradient in recorded[0][2:]:
        seen = (gradient[0] != 0).any((0, 2))
        np.testing.assert_array_equal(seen, np.arange(24) <= 22 - exact)


def test_weights_are_squared_gradients():
    x = jnp.ones((1, 2, 1, 3))
    sample = Sample(x, jnp.ones((1, 2), bool), gradient=-3 * x)
    np.testing.assert_array_equal(sample.weight, 9 * x)
    assert sample._replace(gradient=None).weight is None


def test_fits_each_layer_to_its_own(decoder, windows, fitted):
    assert len(fitted.params) == decoder.config.num_layers
    assert fitted.about["texts"]["tokens"] == 300
    first, second = (layer[0] for layer in fitted.params[:2])
    assert np.isfinite(first).all() and np.abs(first - second).max() > 0.01
    skipped = [sorted({*range(96)} - {0})] * 6  # all but the first token of each window
    everything = kvq.calibrate(decoder, windows, kvq.svdq(fits="texts", **SIZES), num_tokens=9999)
    keys = [
        calibration.record(decoder, jnp.asarray(w[None]), pre_rope=True, gradients=False)[0][0][0]
        for w in windows
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


SMALL = kvq.transform_coding(bits=3.0, group_size=32, residual_length=0)


@pytest.fixture(scope="module")
def shared_out(decoder, windows):
    return kvq.calibrate(decoder, windows, SMALL, num_tokens=500)


def test_one_budget_is_for_all_layers(decoder, windows, shared_out):
    """The sizes are found by the calibration, and its method is the one that has them."""
    config, method = decoder.config, shared_out.method
    heads = config.num_kv_heads

    def num_planes(method):
        """Of keys and of values, of each layer."""
        return np.array([[-(-(2 + sum(x)) // heads) * heads for x in y] for y in method.sizes()])

    planes = num_planes(method)
    width = config.num_kv_heads * config.head_dim
    assert planes.shape == (2, config.num_layers)
    assert len(set(planes.ravel().tolist())) > 1, "all alike: nothing was shared out"
    assert 0.9 * 3.0 < planes.mean() / width <= 3.0
    more = kvq.calibrate(
        decoder, windows, dataclasses.replace(SMALL, value_weight=100.0), num_tokens=500
    )
    assert num_planes(more.method)[1].sum() > planes[1].sum()
    with pytest.raises(ValueError, match="it is fitted to texts: calibration"):
        init_states(config, SMALL, 1, 64)


def test_cache_of_shared_out_bits_predicts_as_the_dense_one(decoder, windows, shared_out):
    method, params = shared_out.method, shared_out.params
    quality = measure.evaluate(
        decoder, windows[:1], {"coded": method}, skip=40, params={"coded": params}
    )["coded"]
    assert 0 < quality.kl < 0.05
    assert quality.shared_bytes == kvq.nbytes(params)
    drawn = kvq.generate(decoder, [[1, 2, 3] * 20], method=method, params=params, max_new_tokens=8)
    assert len(drawn.tokens[0]) == 8


def test_room_made_ahead_for_layers_of_different_sizes_changes_nothing(decoder, shared_out):
    states = init_states(decoder.config, shared_out.method, 2, 200, params=shared_out.params)
    rng, shape = np.random.default_rng(0), states[0].keys.shape
    k, v = (jnp.asarray(rng.normal(size=(2, 40, shape[1], shape[3])), jnp.float32) for _ in "kv")

    @functools.partial(jax.jit, static_argnames="ahead")
    def step(states, k, v, ahead):
        cache = shared_out.method
        if ahead:
            states, cache = cache.make_room(states, 1)
        return tuple(cache.append(state, k, v) for state in states)

    both = {False: states, True: states}
    for i in range(40):
        both = {
            ahead: step(x, k[:, i : i + 1], v[:, i : i + 1], ahead) for ahead, x in both.items()
        }
    assert (both[True][0].coded.num_coded == 32).all()
    jax.tree.map(np.testing.assert_array_equal, both[True], both[False])


def test_saves_and_loads_the_method_that_was_found(decoder, shared_out, tmp_path):
    kvq.save_calibration(tmp_path / "found", shared_out)
    wider = kvq.transform_coding(bits=3.0, residual_length=64)
    loaded = kvq.load_calibration(tmp_path / "found", wider, decoder.config)
    assert loaded.about == shared_out.about
    assert loaded.method == wider.with_sizes(shared_out.method.sizes())
    jax.tree.map(np.testing.assert_array_equal, loaded.params, shared_out.params)
    for other in (kvq.transform_coding(bits=2.0), kvq.transform_coding(bits=3.0, weighs=False)):
        with pytest.raises(ValueError, match="was fitted for the method"):
            kvq.load_calibration(tmp_path / "found", other, decoder.config)


def test_the_model_draws_its_own_texts(decoder):
    windows = calibration.sample_texts(decoder, 2, 40)
    assert windows.shape == (2, 40)
    np.testing.assert_array_equal(windows, calibration.sample_texts(decoder, 2, 40))
    assert (windows != calibration.sample_texts(decoder, 2, 40, seed=1)).mean() > 0.9
    assert len(set(windows[:, 0].tolist())) == 2
    fitted = kvq.calibrate(decoder, None, SMALL, context=40, num_tokens=40)
    assert fitted.about["texts"]["windows"] == 2 and fitted.about["texts"]["context"] == 40
    expected = kvq.calibrate(decoder, windows, SMALL, num_tokens=40)
    assert fitted.about == expected.about


def test_methods_that_want_the_same_of_texts_share_it(decoder, windows, monkeypatch):
    methods = {"cq": CQ, "svdq": kvq.svdq(fits="texts", **SIZES), "kvquant": kvq.kvquant(**SIZES)}
    alone = {k: kvq.calibrate(decoder, windows, v, num_tokens=300) for k, v in methods.items()}
    calls, record = [], calibration.record

    def counted(*args, **kwargs):
        calls.append(kwargs["gradients"])
        return record(*args, **kwargs)

    monkeypatch.setattr(calibration, "record", counted)
    together = kvq.calibrate_all(decoder, windows, methods, num_tokens=300)
    assert calls == [True] * len(windows) + [False] * len(windows)
    assert list(together) == list(methods)
    for name, one in together.items():
        assert one.method == alone[name].method and one.about == alone[name].about
        jax.tree.map(np.testing.assert_array_equal, one.params, alone[name].params)


def test_bits_and_weights_out_of_range_are_refused(decoder, windows):
    for arguments, message in (
        ({"bits": 0}, "bits must be above 0 and at most 8, got 0"),
        ({"bits": 8.5}, "bits must be above 0 and at most 8, got 8.5"),
        ({"value_weight": 0.0}, "value_weight must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            kvq.transform_coding(**arguments)
    with pytest.raises(ValueError, match=r"0\.1 bits are fewer than marks and rounding alone"):
        kvq.calibrate(decoder, windows, kvq.transform_coding(bits=0.1), num_tokens=100)
    assert kvq.recommended() == kvq.transform_coding()
    with pytest.raises(ValueError, match="can't be on different devices"):
        kvq.Sharded(kvq.recommended())
