# SPDX-License-Identifier: Apache-2.0
"""kvq calibrate: what it refuses before any work, and what it keeps when it fails later."""

import os

import pytest

from kvq_jax.cli import terminal
from kvq_jax.methods.transform_coding import TransformCoding


@pytest.fixture
def no_model(monkeypatch):
    def unexpected(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(terminal, "load_model", unexpected)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ott", "ott needs no calibration: use it as it is"),
        ("cq,kivi", "kivi needs no calibration: use it as it is"),
        ("cq, kvquant,cq", "--method names cq twice"),
        ("nonsense", "unknown method 'nonsense'"),
    ],
)
def test_methods_are_checked_before_a_model_is_loaded(kvq, tmp_path, no_model, method, message):
    result = kvq("calibrate", "--method", method, "--out", tmp_path / "out")
    assert result.code == 2 and f"error: {message}" in result.err
    assert len(result.err) < 400
    assert not (tmp_path / "out").exists()


def test_the_folder_is_tried_before_a_model_is_loaded(kvq, tmp_path, no_model):
    (tmp_path / "file").write_text("mine")
    result = kvq("calibrate", "--out", tmp_path / "file")
    assert result.code == 1 and str(tmp_path / "file") in result.err
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "cq").mkdir()
    result = kvq("calibrate", "--method", "kvquant,cq", "--out", tmp_path)
    assert result.code == 2 and "is there already: choose another --out" in result.err
    result = kvq("calibrate", "--out", "/proc/kvq")
    assert result.code == 1 and "/proc/kvq" in result.err
    assert sorted(os.listdir(tmp_path)) == ["cq", "file"]


def test_a_text_that_is_too_short_is_refused_by_its_length(kvq, tiny, text_file, tmp_path):
    sizes = ("--model", tiny, "--context", 400, "--windows", 4)
    result = kvq("calibrate", "--text", text_file, "--out", tmp_path, *sizes)
    assert result.code == 2
    assert "--text has 1200 tokens, and 4 windows of 400 need 1600" in result.err


def test_what_is_fitted_is_kept_when_the_next_method_fails(
    kvq, tiny, text_file, tmp_path, monkeypatch
):
    def fail(*_args):
        raise ValueError("not today")

    monkeypatch.setattr(TransformCoding, "settle", fail)
    sizes = ("--model", tiny, "--context", 64, "--windows", 2, "--tokens", 64)
    options = ("--method", "kvquant,transform_coding", "--text", text_file, "--out", tmp_path)
    result = kvq("calibrate", *options, *sizes)
    assert result.code == 1 and "not today" in result.err
    assert os.listdir(tmp_path) == ["kvquant"]
