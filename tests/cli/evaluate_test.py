# SPDX-License-Identifier: Apache-2.0
import gzip
import io
import json
import sys

import pytest

import kvq_jax
from kvq_jax import measure
from kvq_jax.cli import terminal
from kvq_jax.cli.evaluate import progress
from kvq_jax.models import load

SHORT = ("--context", 97, "--windows", 2, "--skip", 40, "--group-size", 32)
WINDOW = ("--residual-length", 0)


def test_json_says_what_measure_says(kvq, tiny, text_file):
    result = kvq("eval", text_file, "--model", tiny, "--json", *SHORT, *WINDOW)
    assert (result.code, result.err) == (0, "")
    rows = json.loads(result.out)
    assert [row["method"] for row in rows] == ["dense", "kivi", "ott"]
    for row in rows:
        assert set(row) == {
            "method",
            "bits_per_element",
            "shared_bytes",
            "context",
            "tokens",
            "perplexity",
            "kl",
            "kl_stderr",
            "kl_p99",
            "top1",
        }
        assert (row["context"], row["tokens"]) == (97, 2 * (96 - 40))
    dense, coded, ott = rows
    assert (dense["kl"], dense["top1"]) == (0, 1)
    assert coded["kl"] > 0 and ott["kl"] > 0
    assert dense["bits_per_element"] > ott["bits_per_element"] > coded["bits_per_element"]

    model = load(tiny)
    windows = measure.consecutive_windows(model.tokenizer.encode(text_file.read_text()), 97, 2)
    method = kvq_jax.kivi(group_size=32, residual_length=0)
    expected = measure.evaluate(model.decoder, windows, {"kivi": method}, skip=40)["kivi"]
    assert coded["kl"] == pytest.approx(expected.kl)
    assert coded["perplexity"] == pytest.approx(expected.perplexity)


def test_methods_that_need_texts_get_what_calibrate_wrote(
    kvq, tiny, text_file, tmp_path, monkeypatch
):
    sizes = ("--model", tiny, "--context", 97, "--windows", 2)
    wrong = kvq("eval", text_file, "--methods", "svdq,cq", *sizes, "--skip", 40)
    assert wrong.code == 2 and "cq must be fitted first: kvq calibrate" in wrong.err
    folder = tmp_path / "fitted"
    made = kvq(
        "calibrate", "--text", text_file, "--out", folder, "--method", "cq", "--bits", 4, *sizes
    )
    assert made.code == 0, made.err
    again = kvq("calibrate", "--out", folder, "--method", "kvquant,cq", *sizes)
    assert again.code == 2 and f"{folder / 'cq'} is there already" in " ".join(again.err.split())
    options = ("--methods", "cq", "--bits", 4, "--params", folder, "--json")
    result = kvq("eval", text_file, *options, *sizes, "--skip", 40)
    assert result.code == 0, result.err
    assert 0 < json.loads(result.out)[0]["kl"] < 1
    options = ("--model", tiny, "--method", "cq", *options[2:-1], "--max-new-tokens", 6)
    made = kvq("generate", "abc", "--chat", *options, "--json")
    assert made.code == 0, made.err
    for given, code in ((options, 0), (options[:4], 2)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
        said = kvq("chat", *given)
        assert said.code == code, said.err
        assert said.out == (f"{json.loads(made.out)['text']}\n\n" if code == 0 else "")


def test_recommended_is_fitted_to_what_the_model_draws(kvq, tiny, text_file, tmp_path, monkeypatch):
    """The method as fitted is what eval, generate and chat run."""
    folder, sizes = tmp_path / "fitted", ("--model", tiny, "--context", 97, "--windows", 2)
    made = kvq("calibrate", "--out", folder, *sizes)
    assert made.code == 0, made.err
    options = ("--params", folder)
    result = kvq("eval", text_file, "--methods", "recommended", *sizes, "--skip", 40, *options)
    assert result.code == 0, result.err
    assert "recommended" in result.out and "KiB" in result.out  # what all rows share
    one = ("--model", tiny, "--method", "recommended", "--max-new-tokens", 1)
    text = kvq("generate", "abc", *one, *options)
    assert text.code == 0, text.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert kvq("chat", *one, *options).code == 0
    wrong = kvq("chat", *one)
    assert wrong.code == 2 and "recommended must be fitted first: kvq calibrate" in wrong.err
    (folder / "recommended").rename(folder / "transform_coding")
    other = ("--model", tiny, "--method", "transform_coding", "--bits", 3.5)
    refused = kvq("generate", "abc", *other, *options)
    assert refused.code == 1 and "was fitted for the method" in refused.err


def test_table_gzip_and_stdin(kvq, tiny, text_file, tmp_path, monkeypatch):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    arguments = ("--model", tiny, "--methods", "dense", "--context", 64, "--skip", 8)
    outputs = [kvq("eval", path, *arguments) for path in (text_file, packed)]
    stdin = io.TextIOWrapper(io.BytesIO(text_file.read_bytes()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    outputs.append(kvq("eval", "-", *arguments))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].code == 0
    for word in ("method", "perplexity", "dense", "100.0%", "330 predictions"):
        assert word in outputs[0].out


def test_progress_counts_up(monkeypatch):
    console = terminal.Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "err", console)
    with progress(["dense", "ott"], quiet=False) as on_progress:
        on_progress("dense", 50, 100)
        on_progress("dense", 100, 100)
        on_progress("ott", 100, 100)
    assert console.file.getvalue()
    quiet = terminal.Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(terminal, "err", quiet)
    with progress(["dense"], quiet=True) as on_progress:
        on_progress("dense", 50, 100)
    assert not quiet.file.getvalue()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--methods", "dense,foo"), "unknown method 'foo': choose from adaquant, cq, "),
        (("--methods", "dense,kivi", "--num-outliers", 3), "dense, kivi do not take --num-outli"),
        (("--bits", 16), "bits must be one of (1, 2, 3, 4, 5, 6, 7, 8), got 16"),
        (("--context", 129), "--skip 128 leaves nothing to score of --context 129"),
        (("--windows", 0), "Invalid value for '--windows'"),
    ],
)
def test_wrong_calls_exit_2(kvq, text_file, arguments, message):
    result = kvq("eval", text_file, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[0]


def test_text_too_short_exits_1(kvq, tiny, text_file):
    result = kvq("eval", text_file, "--model", tiny, "--context", 601, "--windows", 2, "--json")
    assert (result.code, result.out) == (1, "")
    assert "1200 tokens are too few for 2 windows of 601: give a longer text" in result.err


PACKED = gzip.compress(b"text" * 99, mtime=0)  # the same in all processes: it names the tests


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("none.txt", None, "none.txt: No such file or directory"),
        ("empty.txt", b"", "empty.txt: there is no text in it"),
        ("binary.txt", b"\xff\xfe\x00", "binary.txt: not UTF-8 text"),
        ("plain.gz", b"plain", "plain.gz: not a whole gzip file"),
        ("cut.gz", PACKED[:-9], "cut.gz: not a whole gzip file"),
        ("spoilt.gz", PACKED[:12] + b"spoilt", "spoilt.gz: not a whole gz"),
    ],
)
def test_unreadable_texts_exit_1(kvq, tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    result = kvq("eval", tmp_path / name)
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
