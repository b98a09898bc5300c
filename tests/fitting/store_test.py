# SPDX-License-Identifier: Apache-2.0
"""Saved calibrations: read as written, or refused by name before anything large is made."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax.fitting import contract, store
from kvq_jax.models import DecoderConfig

CONFIG = DecoderConfig(64, 32, 2, 4, 2, 16, 48, 256, 1e-5, 1e4)
CQ = kvq.cq(channels=2, bits=4, group_size=32, residual_length=0)
FOUND = kvq.transform_coding(bits=3.0).with_sizes((((3, 2), (4,)), ((2, 2, 1), (1,))))
TEXTS = {"windows": 2, "context": 8, "tokens": 10, "sha256": "00"}


def calibration(method, config=CONFIG):
    """One of random parameters."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), contract.empty_params(method, config)
    )
    metadata = contract.describe(method, config) | {"sizes": contract.sizes(method), "texts": TEXTS}
    return kvq.Calibration(method, params, metadata)


@pytest.fixture
def folder(tmp_path):
    kvq.save_calibration(tmp_path / "found", calibration(FOUND))
    return tmp_path / "found"


@pytest.mark.parametrize(
    ("method", "other"),
    [
        (CQ, kvq.cq(channels=2, bits=4, group_size=64, residual_length=32)),
        (kvq.kvquant(), kvq.kvquant(residual_length=64)),
        (kvq.svdq(fits="texts"), kvq.svdq(fits="texts", residual_length=64)),
        (kvq.Sharded(CQ), kvq.Sharded(CQ, axis="other")),
        (FOUND, kvq.transform_coding(bits=3.0, residual_length=64)),
    ],
    ids=["cq", "kvquant", "svdq", "sharded", "transform_coding"],
)
def test_loads_what_was_saved_for_other_windows_too(method, other, tmp_path):
    window = contract.fitted_window(method)
    saved = calibration(window)
    kvq.save_calibration(tmp_path / "deep" / "one", saved)
    loaded = kvq.load_calibration(tmp_path / "deep" / "one", other, CONFIG)
    assert loaded.metadata == saved.metadata
    sizes = contract.sizes(window)
    expected = contract.with_sizes(contract.fitted_window(other), sizes)
    assert loaded.method == contract.with_window(other, expected)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, saved.params)
    assert os.listdir(tmp_path / "deep") == ["one"], "something is left over"


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (kvq.transform_coding(bits=2.0), CONFIG, r"the method\.bits 3\.0, not 2\.0"),
        (
            kvq.transform_coding(bits=3.0, weighs=False),
            CONFIG,
            r"the method\.key_codec\.weighs True, not False",
        ),
        (CQ, CONFIG, r"the method\.name 'TransformCoding', not 'Window'"),
        (FOUND, dataclasses.replace(CONFIG, num_layers=3), r"the model\.num_layers 2, not 3"),
        (kvq.ott(), CONFIG, "the method needs no calibration"),
    ],
)
def test_refuses_another_method_or_model_by_what_differs(folder, method, config, message):
    with pytest.raises(ValueError, match=message):
        kvq.load_calibration(folder, method, config)


def changed(description, key, value):
    """A description with a value at a key, `a.b` within a; `...` takes the key out."""
    *path, last = key.split("/")
    inner = description
    for name in path:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return description


FIRST = "arrays/0.0.analysis"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", ..., "which has a format"),
        ("format", 2, "is of format 2, and this version of kvq reads format 1: calibrate again"),
        ("format", True, "which has a format"),
        ("texts", ..., "the key texts is missing"),
        ("arrays", [], "arrays must be of type dict"),
        ("surprise", 1, "unknown key 'surprise'"),
        ("texts/tokens", "ten", "texts.tokens must be of type int, got 'ten'"),
        ("texts/tokens", True, "texts.tokens must be of type int, got True"),
        ("texts/more", 1, "unknown key texts.'more'"),
        ("method/more", 1, "the method with unknown 'more'"),
        ("method/bits", ..., "the method without 'bits'"),
        ("method/key_codec", 7, "the method.key_codec 7"),
        ("model/head_dim", 10**400, "the model.head_dim 1000"),
        ("sizes", None, "wrong sizes: sizes must be falling counts"),
        ("sizes", [[[3, 2], [4]]], "wrong sizes: sizes must be falling counts"),
        ("sizes", [[[3, 2], ["x"]], [[2, 2, 1], [1]]], "wrong sizes"),
        ("sizes", [[[2, 3], [4]], [[2, 2, 1], [1]]], "wrong sizes"),
        (
            "sizes",
            [[[10**9, 2], [4]], [[2, 2, 1], [1]]],
            "1000000000 latent channels are more",
        ),
        ("sizes", [[[3, 2]], [[2, 2, 1]]], "wrong sizes: layer 1 was not fitted: there were 1"),
        ("sizes", [[[3, 2], [5]], [[2, 2, 1], [1]]], "arrays.1.0.analysis.shape must be"),
        (FIRST, ..., "the key arrays.0.0.analysis is missing"),
        ("arrays/extra", {}, "unknown key arrays.'extra'"),
        (FIRST + "/shape", [10**9], r"shape must be \[1, 32, 3\], got \[1000000000\]"),
        (FIRST + "/dtype", "object", "dtype must be bfloat16, got 'object'"),
        ("files/_METADATA", "0", "_METADATA has changed since it was saved"),
        ("files/_METADATA", ..., "_METADATA was not saved with the calibration"),
        ("files/more", "0", "'more' is missing"),
    ],
)
def test_refuses_a_damaged_description_by_file_and_key(folder, key, value, message):
    file = folder / "description.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(changed(description, key, value)))
    with pytest.raises(ValueError, match=message) as error:
        kvq.load_calibration(folder, FOUND, CONFIG)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "not the description of a calibration"),
        (b" " * (17 << 20), "is longer than the"),
    ],
    ids=["empty", "deep", "digits", "bytes", "list", "long"],
)
def test_refuses_what_is_no_description(folder, data, message):
    (folder / "description.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        kvq.load_calibration(folder, FOUND, CONFIG)


def test_refuses_foreign_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist: kvq calibrate makes"):
        kvq.load_calibration(tmp_path / "nothing", FOUND, CONFIG)
    with pytest.raises(ValueError, match=r"there is no description\.json in it"):
        kvq.load_calibration(tmp_path, FOUND, CONFIG)
    shutil.rmtree(folder / "arrays")
    with pytest.raises(ValueError, match="there is no folder arrays in it"):
        kvq.load_calibration(folder, FOUND, CONFIG)
    (folder / "arrays").mkdir()
    with pytest.raises(ValueError, match=r"arrays is damaged: .* is missing"):
        kvq.load_calibration(folder, FOUND, CONFIG)
    os.mkfifo(folder / "arrays" / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        kvq.load_calibration(folder, FOUND, CONFIG)
    (folder / "description.json").unlink()
    os.mkfifo(folder / "description.json")
    with pytest.raises(ValueError, match=r"there is no description\.json in it"):
        kvq.load_calibration(folder, FOUND, CONFIG)


def test_a_changed_byte_is_found_before_arrays_are_read(folder, monkeypatch):
    monkeypatch.setattr(store, "_read_arrays", None)
    files = [x for x in (folder / "arrays").rglob("*") if x.is_file()]
    assert len(files) > 4
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        for changed in (data, data[:-1], b""):
            file.write_bytes(changed)
            with pytest.raises(ValueError, match="has changed since it was saved") as error:
                kvq.load_calibration(folder, FOUND, CONFIG)
            assert str(file) in str(error.value)
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def test_arrays_of_other_shapes_are_not_read(folder, tmp_path):
    """Where description and digests say that they are the right ones."""
    more = FOUND.with_sizes((((3, 2), (4,)), ((2, 2, 1), (2,))))
    kvq.save_calibration(tmp_path / "more", calibration(more))
    description = json.loads((folder / "description.json").read_text())
    other = json.loads((tmp_path / "more" / "description.json").read_text())
    file = tmp_path / "more" / "description.json"
    file.write_text(json.dumps(description | {"files": other["files"]}))
    message = r"arrays is damaged: ValueError: 1\.1\.analysis is bfloat16 \(1, 32, 2\), not"
    with pytest.raises(ValueError, match=message):
        kvq.load_calibration(tmp_path / "more", FOUND, CONFIG)


def test_files_of_more_bytes_than_the_arrays_take_are_not_read(folder):
    with (folder / "arrays" / "manifest.ocdbt").open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="arrays has more bytes than the arrays of this method"):
        kvq.load_calibration(folder, FOUND, CONFIG)


def test_overwrites_nothing(folder, tmp_path):
    saved = calibration(CQ)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("found", "file", "empty", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists already: choose another folder"):
            kvq.save_calibration(tmp_path / name, saved)
    assert (tmp_path / "file").read_text() == "x"
    kvq.load_calibration(folder, FOUND, CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "found", "link"]
    with pytest.raises(OSError):
        store.check_new("/proc/kvq/one")


def test_of_two_writers_one_wins_whole(tmp_path, monkeypatch):
    """The other comes when the first has looked whether the folder is there."""
    first, second = calibration(CQ), calibration(FOUND)
    look = store.check_new

    def be_late(path):
        look(path)
        monkeypatch.setattr(store, "check_new", look)
        kvq.save_calibration(path, second)

    monkeypatch.setattr(store, "check_new", be_late)
    with pytest.raises(FileExistsError, match="one exists already"):
        kvq.save_calibration(tmp_path / "one", first)
    assert os.listdir(tmp_path) == ["one"]
    assert kvq.load_calibration(tmp_path / "one", FOUND, CONFIG).metadata == second.metadata


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        kvq.save_calibration(tmp_path / "one", calibration(CQ)._replace(metadata={"x": object()}))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_is_an_os_error(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*_args, **_kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(OSError, match=r"one could not be written: .*No space left on device"):
        kvq.save_calibration(tmp_path / "one", calibration(CQ))
    assert os.listdir(tmp_path) == []
