# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import platform
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

import kvq_jax
from kvq_jax import aot
from kvq_jax.cli.fits import advice
from kvq_jax.fits import Fit
from kvq_jax.models import init_states, load_config

# There is no libtpu for other machines.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="libtpu is for x86-64 Linux"
)


@pytest.fixture
def config_only(tiny, tmp_path):
    """The tiny model's folder without its weights."""
    shutil.copy(tiny / "config.json", tmp_path)
    return tmp_path


def test_what_fits(kvq, config_only):
    result = kvq("fits", "--model", config_only, "--chip", "v5e", "--context", 2048, "--bits", 2)
    assert (result.code, result.err) == (0, "")
    for words in ("on v5e", "15.75 GiB", "It fits: compiled in ", "the cache updated in place"):
        assert words in result.out
    assert "tokens a row would fit" in result.out


def test_what_fits_as_json(kvq, config_only):
    options = ("--method", "dense", "--batch", 3, "--json")
    result = kvq("fits", "--model", config_only, "--chip", "v6e", "--context", 512, *options)
    assert (result.code, result.err) == (0, "")
    fit = json.loads(result.out)
    assert fit["fits"]
    # 3 layers x keys and values x 2 heads x 16 channels x 2 bytes, and the lengths
    assert fit["cache_bytes"] == 3 * (2 * 3 * 512 * 2 * 16 * 2 + 3 * 4)
    assert fit["required_bytes"] == fit["compiled"]["peak_bytes"]
    assert fit["compiled"]["argument_bytes"] >= fit["weights_bytes"] + fit["cache_bytes"]
    assert fit["compiled"]["alias_bytes"] >= fit["cache_bytes"]
    assert "hlo" not in fit["compiled"]


@pytest.mark.parametrize("name", ["svdq", "cq"])
def test_what_fits_of_keys_from_before_rope(kvq, config_only, name):
    """In codes that no kernel reads, and with what is fitted to a prompt or to texts."""
    options = ("--model", config_only, "--method", name, "--chip", "v5e", "--json")
    result = kvq("fits", *options, "--context", 512)
    assert (result.code, result.err) == (0, "")
    fit = json.loads(result.out)
    config, method = load_config(config_only), getattr(kvq_jax, name)()
    states = jax.eval_shape(lambda: init_states(config, method, 1, 512, jnp.bfloat16))
    assert fit["fits"]
    assert fit["cache_bytes"] == kvq_jax.nbytes(states)
    assert fit["compiled"]["argument_bytes"] >= fit["weights_bytes"] + fit["cache_bytes"]


def test_what_does_not_fit_exits_1(kvq, config_only):
    model = ("--model", config_only, "--method", "dense", "--batch", 4)
    result = kvq("fits", *model, "--chip", "v5e", "--context", 2**26)
    assert (result.code, result.err) == (1, "")
    for words in ("It does not fit: the compiler says so", "By arithmetic, not compiled", "tokens"):
        assert words in result.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--chip", "v9"), "unknown chip 'v9': choose from v4, v5e, v5p, v6e, 7x"),
        (("--model", "gpt"), "unknown model 'gpt': choose from smollm2-135m, "),
        (("--method", "foo"), "unknown method 'foo'"),
        (("--context", 0), "Invalid value for '--context'"),
    ],
)
def test_wrong_calls_exit_2(kvq, config_only, arguments, message):
    options = {"--model": config_only, "--chip": "v5e", "--context": 512}
    options |= dict(zip(*[iter(arguments)] * 2, strict=True))
    result = kvq("fits", *(x for pair in options.items() for x in pair))
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[0]


def test_advice():
    asked = {"chip": "v5e", "context": 4096, "hbm_bytes": 0, "required_bytes": 0}
    asked |= {"weights_bytes": 0, "cache_bytes": 0, "compiled": None}
    asked |= {"larger_chips": (), "max_context": 0, "num_devices": None}

    def told(**changes):
        return "\n".join(advice(Fit(**{**asked, **changes}), 8))

    assert told(fits=True, max_context=4096) == "there is hardly room for more tokens"
    assert told(fits=True, max_context=8192) == "up to 8,192 tokens a row would fit"
    assert told(fits=False) == "no number of tokens would do: weights and the rest are too much"
    rest = {"larger_chips": ("v6e", "v5p"), "max_context": 2048, "num_devices": 4}
    assert told(fits=False, **rest).splitlines() == [
        "a chip that has the memory: v6e, v5p",
        "up to 2,048 tokens a row would fit",
        "4 of these chips, with weights and the 8 KV heads shared out",
    ]


def test_unknown_folder_exits_1(kvq, tmp_path):
    result = kvq("fits", "--model", tmp_path / "no", "--chip", "v5e", "--context", 512)
    assert (result.code, result.out) == (1, "")
    assert f"{tmp_path / 'no'}: neither" in result.err


def test_without_libtpu_exits_1(kvq, config_only, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = kvq("fits", "--model", config_only, "--chip", "v5e", "--context", 512)
    assert (result.code, result.out) == (1, "")
    assert "pip install libtpu" in result.err


def test_a_compiler_that_dies_exits_1(kvq, config_only, monkeypatch):
    def compile_for(*_, **__):
        raise aot.CompileError("the compiler for v5e died (SIGABRT) of this program")

    monkeypatch.setattr(aot, "compile_for", compile_for)
    result = kvq("fits", "--model", config_only, "--chip", "v5e", "--context", 512)
    assert (result.code, result.out) == (1, "")
    assert "error: the compiler for v5e died" in result.err
