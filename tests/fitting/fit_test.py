# SPDX-License-Identifier: Apache-2.0
"""Calibration: each layer's own fit, what it is good for, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import measure
from kvq_jax.codecs.base import Sample
from kvq_jax.codecs.vector import Vector
from kvq_jax.fitting import fit
from kvq_jax.fitting.record import record
from kvq_jax.fitting.texts import sample_texts
from kvq_jax.models import init_states

SIZES = {"group_size": 32, "residual_length": 0}
CQ = kvq.cq(channels=2, bits=4, iterations=3, **SIZES)


@pytest.fixture(scope="module")
def fitted(decoder, windows):
    return kvq.calibrate(decoder, windows, CQ, num_tokens=300)


def test_weights_are_squared_gradients():
    x = jnp.ones((1, 2, 1, 3))
    sample = Sample(x, jnp.ones((1, 2), bool), gradient=-3 * x)
    np.testing.assert_array_equal(sample.weight, 9 * x)
    assert sample._replace(gradient=None).weight is None


def test_fits_each_layer_to_its_own(decoder, windows, fitted):
    assert len(fitted.params) == decoder.config.num_layers
    assert fitted.metadata["texts"]["tokens"] == 300
    first, second = (layer[0] for layer in fitted.params[:2])
    assert np.isfinite(first).all() and np.abs(first - second).max() > 0.01
    skipped = [sorted({*range(96)} - {0})] * 6  # all but the first token of each window
    everything = kvq.calibrate(decoder, windows, kvq.svdq(fits="texts", **SIZES), num_tokens=9999)
    keys = [
        record(decoder, jnp.asarray(w[None]), pre_rope=True, gradients=False)[0].keys[0]
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


def test_refuses_what_does_not_fit(decoder, windows, fitted):
    for method in (kvq.kivi(), kvq.dense(), kvq.Sharded(kvq.kivi())):
        with pytest.raises(ValueError, match="the method needs no calibration: it fits nothing"):
            kvq.calibrate(decoder, windows, method)
    with pytest.raises(ValueError, match="mine needs no calibration"):
        kvq.calibrate_all(decoder, None, {"cq": CQ, "mine": kvq.ott()})
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


def test_methods_that_want_the_same_of_texts_share_it(decoder, windows, monkeypatch):
    methods = {"cq": CQ, "svdq": kvq.svdq(fits="texts", **SIZES), "kvquant": kvq.kvquant(**SIZES)}
    alone = {k: kvq.calibrate(decoder, windows, v, num_tokens=300) for k, v in methods.items()}
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["gradients"])
        return record(*args, **kwargs)

    monkeypatch.setattr(fit, "record", counted)
    together = kvq.calibrate_all(decoder, windows, methods, num_tokens=300)
    assert calls == [True] * len(windows) + [False] * len(windows)
    assert list(together) == list(methods)
    for name, one in together.items():
        assert one.method == alone[name].method and one.metadata == alone[name].metadata
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


def test_models_that_draw_their_own_texts_are_fitted_to_these(decoder):
    fitted = kvq.calibrate(decoder, None, SMALL, context=40, num_tokens=40)
    assert fitted.metadata["texts"]["windows"] == 2 and fitted.metadata["texts"]["context"] == 40
    expected = kvq.calibrate(decoder, sample_texts(decoder, 2, 40), SMALL, num_tokens=40)
    assert fitted.metadata == expected.metadata


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": -3}, "num_tokens must be at least 1, got -3"),
        ({"context": 1}, "context must be at least 2 tokens, got 1"),
        ({"texts": None, "context": 0}, "context must be at least 2 tokens, got 0"),
        ({"skip_first": -1}, "skip_first must be at least 0, got -1"),
        ({"skip_first": 96}, "skip_first=96 leaves nothing of windows of 96 tokens"),
        ({"texts": []}, "texts is empty"),
        ({"texts": np.full((2, 96), 128)}, "token id 128 is not in the vocabulary of 128 tokens"),
    ],
)
def test_arguments_are_checked_before_any_work(
    decoder, windows, monkeypatch, arguments, message, as_users_run_it
):
    def unexpected(*_args, **_kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(fit, "record", unexpected)
    monkeypatch.setattr(fit, "sample_texts", unexpected)
    texts = arguments.get("texts", windows)
    rest = {k: v for k, v in arguments.items() if k != "texts"}
    with pytest.raises(ValueError, match=message):
        kvq.calibrate(decoder, texts, CQ, **rest)
    with pytest.raises(ValueError, match=message):
        fit.calibrate_each(decoder, texts, {"cq": CQ}, **rest)  # not only when it is iterated over


def test_what_is_not_finite_is_refused_by_the_first_window(decoder, windows, monkeypatch):
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        first, second = record(*args, **kwargs)
        return [first, second._replace(values=second.values.at[0, 0, :, 0].set(jnp.nan))]

    monkeypatch.setattr(fit, "record", broken)
    with pytest.raises(ValueError, match="the values of layer 1 in window 0 of the texts have NaN"):
        kvq.calibrate(decoder, windows, CQ, num_tokens=300)
    assert len(calls) == 1


def test_a_method_shared_out_over_devices_is_fitted_as_it_is_alone(decoder, windows, fitted):
    sharded = kvq.calibrate(decoder, windows, kvq.Sharded(CQ), num_tokens=300)
    assert sharded.method == kvq.Sharded(CQ)
    assert sharded.metadata == fitted.metadata
    jax.tree.map(np.testing.assert_array_equal, sharded.params, fitted.params)


def test_each_method_is_there_before_the_next_is_fitted(decoder, windows, monkeypatch):
    methods = {"cq": CQ, "wrong": dataclasses.replace(SMALL, bits=0.1)}
    fits = fit.calibrate_each(decoder, windows, methods, num_tokens=100)
    name, calibration = next(fits)
    assert name == "cq" and len(calibration.params) == decoder.config.num_layers
    with pytest.raises(ValueError, match="bits are fewer"):
        next(fits)


@dataclasses.dataclass(frozen=True)
class Asking(Vector):
    """A codec that is fitted with queries, and notes what it was given."""

    use_queries = True
    given = []  # noqa: RUF012

    def fit(self, sample):
        self.given.append(sample)
        return super().fit(sample)


def test_queries_come_with_the_keys_they_were_recorded_with(decoder, windows):
    """At the same positions, and only to a method that asks for them."""
    Asking.given.clear()
    codec = Asking(2, 4, iterations=1)
    method = dataclasses.replace(CQ, key_codec=codec, value_codec=codec)
    both = kvq.calibrate_all(decoder, windows, {"cq": CQ, "asking": method}, num_tokens=300)
    keys, values = Asking.given[:2]
    config = decoder.config
    assert keys.q.shape == (1, 300, config.num_q_heads, config.head_dim)
    assert values.q is None
    window = jnp.asarray(windows[:1])
    every = record(decoder, window, pre_rope=True, gradients=False, queries=True)[0]
    ours, recorded = np.asarray(keys.x[0, :50, 0]), np.asarray(every.keys[0, 0])
    at = np.abs(recorded[:, None] - ours).sum(-1).argmin(0)
    np.testing.assert_allclose(keys.q[0, :50], every.queries[0].swapaxes(0, 1)[at], atol=1e-5)
    assert both["cq"].metadata == kvq.calibrate(decoder, windows, CQ, num_tokens=300).metadata
