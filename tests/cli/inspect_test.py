# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from matplotlib import image

import kvq_jax
from kvq_jax.cli.inspect import Trace, draw, trace_prompt
from kvq_jax.decoding.generation import generate
from kvq_jax.models import load

WINDOW = ("--group-size", 32, "--residual-length", 0)
METHOD = kvq_jax.ott(group_size=32, residual_length=0)


@pytest.fixture(scope="module")
def ids(text_file):
    """Token ids of the tiny model, 97 of them: two groups get coded."""
    return [3 + ord(c) % 90 for c in text_file.read_text()[:97]]


@pytest.fixture(scope="module")
def trace(tiny, ids):
    return trace_prompt(load(tiny).decoder, ids, METHOD)


def test_smallest_coded_keys_are_kept(trace):
    assert trace.magnitudes.shape == (3, 2, 97)
    assert trace.num_coded == 96
    assert trace.kept[:2] == [[[], []]] * 2  # OTT doesn't trace the first two layers
    for head in range(2):
        smallest = np.argsort(trace.magnitudes[2, head, :96])[:3]
        kept, moved = trace.kept[2][head], trace.moved[2][head]
        assert set(kept) <= set(range(96))
        assert len(kept) == 3
        # A token that has lost its place can't come back, so these need not be the smallest
        # of all; but nothing smaller was left out of both pools.
        assert set(smallest.tolist()) <= set(kept) | set(moved)


def test_trace_is_that_of_the_generating_model(tiny, ids, trace):
    states = generate(load(tiny), [ids], method=METHOD, max_new_tokens=1, capacity=128).states
    for layer, state in enumerate(states):
        positions = np.asarray(state.pool.positions[0, :, :3])
        kept = [sorted(p[p >= 0].tolist()) for p in positions]
        assert kept == trace.kept[layer]


def test_json_table_and_figure(kvq, tiny, text_file, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text_file.read_text()[:97])
    out = tmp_path / "keys.png"
    arguments = ("inspect", f"@{prompt}", "--model", tiny, *WINDOW)
    result = kvq(*arguments, "--json", "--out", out)
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert len(found["tokens"]) == 97
    assert found["num_coded"] == 96
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    assert [len(head) for head in found["layers"][2]["kept"]] == [3, 3]
    pixels = image.imread(out)
    assert min(pixels.shape[:2]) > 250
    assert pixels.std() > 0.05  # it isn't blank

    shown = kvq(*arguments)
    assert shown.code == 0
    for word in ("layer", "KV head 1", "of 96 coded ones (97 in all)", "of 6 heads"):
        assert word in shown.out
    for head in found["layers"][2]["kept"]:
        assert " ".join(map(str, head)) in shown.out


def test_figure_of_one_layer_and_many_heads(tmp_path):
    magnitudes = np.random.default_rng(0).random((1, 12, 40)).astype(np.float32)
    trace = Trace(magnitudes, [[[1, 5]] * 12], [[[7]] * 12], 32)
    draw(trace, tmp_path / "one.png")
    assert image.imread(tmp_path / "one.png").std() > 0.02


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--num-outliers", 0), 2, "--num-outliers 0 traces nothing"),
        (("--group-size", 20), 2, "group_size must be one of (32, 64, 128), got 20"),
        (("--out", "keys.docx"), 2, "--out keys.docx must end in .png"),
        (("--out", "no-such-folder/keys.png"), 1, "there is no folder no-such-folder"),
        ((), 1, "the prompt has 12 tokens and nothing is coded, or traced, before there are 65"),
    ],
)
def test_what_cannot_be_inspected(kvq, tiny, arguments, code, message):
    result = kvq("inspect", "twelve chars", "--model", tiny, *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err.splitlines()[0]


def test_figure_that_cannot_be_written_exits_1(kvq, tiny, tmp_path):
    out = tmp_path / "folder.png"
    out.mkdir()
    result = kvq("inspect", "x" * 97, "--model", tiny, "--out", out)
    assert (result.code, result.out) == (1, "")
    assert "folder.png: is a folder" in result.err


def test_missing_prompt_file_exits_1(kvq, tiny):
    result = kvq("inspect", "@no-such-file", "--model", tiny)
    assert result.code == 1
    assert "no-such-file: No such file or directory" in result.err
