# SPDX-License-Identifier: Apache-2.0
import os
import threading
import time

import pytest

from kvq_jax.models.json_files import read_json, short, token_ids


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes x.json and returns its path."""

    def write(content):
        path = tmp_path / "x.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_ordinary_files(write):
    assert read_json(write('{"a": [1, {"b": null}], "ü": -2.5e3}')) == {
        "a": [1, {"b": None}],
        "ü": -2500.0,
    }
    assert read_json(write("{}")) == {}
    # What transformers writes for a tokenizer without a longest length: int(1e30).
    huge = 1000000000000000019884624838656
    assert read_json(write(f'{{"model_max_length": {huge}}}')) == {"model_max_length": huge}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not JSON .*utf-8"),
        ("[1]", r"holds no JSON object, but \[1\]"),
        ("null", "holds no JSON object, but None"),
        ("[" * 100_000 + "]" * 100_000, "not JSON .*recursion"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not JSON .*recursion"),
        ('{"deep":' + "[" * 500 + "]" * 500 + "}", "deep nests more than 64 levels deep"),
        ('{"n": ' + "7" * 400 + "}", "n holds a number that is NaN or too large"),
        ('{"n": -' + "7" * 9000 + "}", "n holds a number that is NaN or too large"),
        ('{"n": 1e400}', "n holds a number that is NaN or too large"),
        ('{"n": [0, {"m": NaN}]}', "n holds a number that is NaN or too large"),
        ('{"n": -Infinity}', "n holds a number that is NaN or too large"),
    ],
)
def test_bad_files_are_refused(write, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 300 + len(str(path))


def test_a_large_file_is_not_read(write):
    path = write("{}")
    os.truncate(path, 1 << 36)  # sparse: takes no room on the disk
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"x\.json: larger than 16 MiB"):
        read_json(path)
    assert time.monotonic() - start < 5


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.json: not there"):
        read_json(tmp_path / "x.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"folder\.json: not a regular file"):
        read_json(tmp_path / "folder.json")


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    errors = []

    def read():
        try:
            read_json(tmp_path / "x.json")
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert errors == [f"{tmp_path / 'x.json'}: not a regular file"]


def test_token_ids():
    def ids(value):
        return token_ids({"eos_token_id": value}, "eos_token_id", source="x.json")

    assert token_ids({}, "eos_token_id", source="x.json") == []
    assert (ids(None), ids(2), ids([2, 3]), ids([])) == ([], [2], [2, 3], [])
    for wrong in ("2", "</s>", True, 2.0, [[2]], [2, "3"], [2, False], {"id": 2}, [None]):
        with pytest.raises(ValueError, match=r"x\.json: eos_token_id must be an integer or a list"):
            ids(wrong)


def test_short_is_short():
    for value in (
        "x" * 10_000,
        ["x" * 10_000] * 100,
        {str(i): [i] * 99 for i in range(99)},
        10**99,
    ):
        assert len(short(value)) < 1000
    assert short("DeepseekV3ForCausalLM") == "'DeepseekV3ForCausalLM'"
