# SPDX-License-Identifier: Apache-2.0
import io
import json
import math
import sys
from pathlib import Path

import pytest
import typer

import kvq_jax
from kvq_jax.cli import options, terminal
from kvq_jax.decoding.generation import generate
from kvq_jax.models import load

PROMPT = "The keeper wound the clockwork that turned the lens, and the lens turned."
WINDOW = ("--group-size", 32, "--residual-length", 0)


@pytest.fixture
def stdin(monkeypatch):
    """Returns a function that puts bytes on stdin."""

    def put(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return put


def run_json(kvq, tiny, *arguments) -> dict:
    result = kvq("generate", PROMPT, "--model", tiny, "--json", *arguments)
    assert result.code == 0, result.err
    assert result.err == ""
    return json.loads(result.out)


def test_json_says_what_the_library_says(kvq, tiny):
    figures = run_json(kvq, tiny, "--max-new-tokens", 20, *WINDOW)
    method = kvq_jax.ott(group_size=32, residual_length=0)
    expected = generate(load(tiny), PROMPT, method=method, max_new_tokens=20)
    assert list(figures) == [
        "text",
        "tokens",
        "tokens_per_second",
        "cache_bytes",
        "dense_cache_bytes",
    ]
    assert figures["tokens"] == expected.tokens[0]
    assert figures["text"] == expected.texts[0]
    assert figures["cache_bytes"] == kvq_jax.nbytes(expected.states)
    assert figures["tokens_per_second"] > 0


def test_bytes_are_compared_at_one_capacity_and_dtype(kvq, tiny):
    ott = run_json(kvq, tiny, "--max-new-tokens", 1, *WINDOW)
    dense = run_json(kvq, tiny, "--max-new-tokens", 1, "--method", "dense")
    # 3 layers x keys and values x 2 heads x 16 channels x 512 tokens of float32, int32 a layer
    assert dense["cache_bytes"] == 3 * (2 * 2 * 16 * 512 * 4 + 4)
    assert dense["dense_cache_bytes"] == ott["dense_cache_bytes"] == dense["cache_bytes"]
    assert ott["cache_bytes"] < 0.4 * ott["dense_cache_bytes"]
    options = ("--dtype", "bfloat16", "--capacity", 1000)
    half = run_json(kvq, tiny, "--max-new-tokens", 1, "--method", "dense", *options)
    assert half["dense_cache_bytes"] == 3 * (2 * 2 * 16 * 1000 * 2 + 4)


def test_method_options_reach_the_method(kvq, tiny):
    options = {
        "bits": 4,
        "value_bits": 8,
        "group_size": 64,
        "residual_length": 3,
        "num_outliers": 5,
    }
    flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    figures = run_json(kvq, tiny, "--max-new-tokens", 1, "--capacity", 300, *flags)
    state = kvq_jax.ott(**options).init(kvq_jax.CacheSpec(1, 2, 300, 16, "float32"))
    assert figures["cache_bytes"] == 3 * kvq_jax.nbytes(state)


def test_text_streams_to_stdout_and_figures_to_stderr(kvq, tiny):
    arguments = ("--max-new-tokens", 30, "--temperature", 1.5, "--method", "dense")
    expected = run_json(kvq, tiny, *arguments)
    result = kvq("generate", PROMPT, "--model", tiny, *arguments)
    assert result.code == 0
    assert result.out == expected["text"] + "\n"
    assert f"{len(expected['tokens'])} tokens" in result.err
    assert "dense cache 384.0 KiB (512 tokens, float32)" in result.err


def test_seed_decides_what_is_drawn(kvq, tiny):
    draw = ("--method", "dense", "--temperature", 1.5, "--max-new-tokens", 12, "--seed")
    draws = [run_json(kvq, tiny, *draw, seed)["tokens"] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_chat_puts_the_prompt_into_the_template(kvq, tiny):
    model = load(tiny)
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
    expected = generate(model, text, method=kvq_jax.dense(), max_new_tokens=8)
    arguments = ("--method", "dense", "--max-new-tokens", 8)
    figures = run_json(kvq, tiny, "--chat", *arguments)
    assert figures["tokens"] == expected.tokens[0]
    assert figures["tokens"] != run_json(kvq, tiny, *arguments)["tokens"]


def test_prompt_from_stdin(kvq, tiny, stdin):
    stdin(PROMPT.encode())
    arguments = ("--method", "dense", "--max-new-tokens", 8)
    result = kvq("generate", "-", "--model", tiny, "--json", *arguments)
    assert json.loads(result.out)["tokens"] == run_json(kvq, tiny, *arguments)["tokens"]


def test_speed_of_too_few_tokens_is_null(kvq, tiny):
    arguments = ("--method", "dense", "--max-new-tokens", 1)
    assert run_json(kvq, tiny, *arguments)["tokens_per_second"] is None
    result = kvq("generate", PROMPT, "--model", tiny, *arguments)
    assert result.code == 0
    assert "nan" not in result.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--method", "foo"), "unknown method 'foo': choose from adaquant, cq, "),
        (("--method", "dense", "--bits", 2), "dense does not take --bits"),
        (("--method", "kivi", "--num-outliers", 2), "kivi does not take --num-outliers"),
        (("--bits", 16), "bits must be one of (1, 2, 3, 4, 5, 6, 7, 8), got 16"),
        (("--group-size", 33), "group_size must be one of (32, 64, 128), got 33"),
        (("--residual-length", -1), "residual_length must be at least 0, got -1"),
        (("--temperature", -1), "temperature must be 0 or more, got -1.0"),
        (("--top-p", 0.9), "--top-p has no effect without a --temperature above 0"),
        (("--temperature", 1, "--top-k", 0), "top_k must be at least 1, got 0"),
        (("--max-new-tokens", 0), "Invalid value for '--max-new-tokens'"),
        (("--dtype", "float16"), "'float16' is not one of 'float32', 'bfloat16'"),
        (("--bit", 2), "No such option: --bit"),
    ],
)
def test_wrong_calls_exit_2(kvq, arguments, message):
    result = kvq("generate", PROMPT, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[0]
    assert result.err.splitlines()[1:] == ["see kvq generate --help"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "no-such-model"), "no-such-model: neither 'smollm2', nor a .gguf file"),
        (("--model", "no.gguf"), "no.gguf: there is no such file"),
        (("--capacity", 50), "need a capacity of 136, got 50"),
    ],
)
def test_what_cannot_be_done_exits_1(kvq, tiny, arguments, message):
    result = kvq("generate", PROMPT, "--model", tiny, *arguments)
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "data, message",
    [(b" \n", "stdin: there is no text in it"), (b"\xff\xfe", "stdin: not UTF-8 text")],
)
def test_stdin_without_text_exits_1(kvq, tiny, stdin, data, message):
    stdin(data)
    result = kvq("generate", "-", "--model", tiny)
    assert result.code == 1
    assert message in result.err


def test_empty_prompt_exits_1(kvq, tiny):
    result = kvq("generate", "", "--model", tiny)
    assert (result.code, result.out) == (1, "")
    assert "has no tokens" in result.err


def test_unexpected_errors_are_not_hidden(kvq, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(terminal, "load_model", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        kvq("generate", PROMPT)


def test_interrupt_exits_130(kvq, tiny, monkeypatch):
    def interrupted(*_, **__):
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr("kvq_jax.decoding.generation.stream", interrupted)
    assert kvq("generate", PROMPT, "--model", tiny).code == 130


def test_stream_stops_when_its_reader_is_gone(monkeypatch):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    def pieces():
        try:
            yield "a"
        finally:
            ended.append(True)

    ended = []
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        terminal.stream(pieces())
    assert ended


def test_stop_strings_end_the_text(kvq, tiny):
    arguments = ("--max-new-tokens", 30, "--method", "dense")
    text = run_json(kvq, tiny, *arguments)["text"]
    stop, other = text[9:12], "never there"
    expected = text[: text.index(stop)]
    figures = run_json(kvq, tiny, *arguments, "--stop", stop, "--stop", other)
    assert figures["text"] == expected
    result = kvq("generate", PROMPT, "--model", tiny, *arguments, "--stop", stop)
    assert result.out == expected + "\n"


def test_options_of_methods_that_take_them():
    made = options.make_methods(["dense", "kivi"], bits=4, group_size=None)
    assert made == {"dense": kvq_jax.dense(), "kivi": kvq_jax.kivi(bits=4)}
    with pytest.raises(typer.BadParameter.__bases__[0], match="dense, kivi do not take --num-ou"):
        options.make_methods(["dense", "kivi"], num_outliers=4)


def test_every_method_is_found():
    files = Path(kvq_jax.methods.__file__).parent.glob("[a-z]*.py")
    # recommended is a setting of one of them.
    assert set(options.constructors()) == {file.stem for file in files} | {"recommended"}


def test_size():
    assert [terminal.size(x) for x in (12, 2048, 7 * 2**19, 2**31)] == [
        "12 bytes",
        "2.0 KiB",
        "3.5 MiB",
        "2.0 GiB",
    ]


def test_json_without_nan(capsys):
    terminal.print_json([{"a": math.nan, "b": [math.inf, 1.5]}])
    assert json.loads(capsys.readouterr().out) == [{"a": None, "b": [None, 1.5]}]
