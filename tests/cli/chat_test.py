# SPDX-License-Identifier: Apache-2.0
import io
import sys

import pytest

import kvq_jax
from kvq_jax.decoding.generation import generate
from kvq_jax.models import load

SHORT = ("--method", "dense", "--max-new-tokens", 6, "--capacity", 256, "--temperature", 1.5)


@pytest.fixture
def chat(kvq, tiny, monkeypatch):
    """Returns a function that types lines into `kvq chat`."""

    def run(*lines, options=SHORT, model=tiny):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        return kvq("chat", "--model", model, *options)

    return run


def answer(model, messages):
    ids = model.tokenizer.encode(model.tokenizer.apply_chat_template(messages))
    made = generate(
        model,
        [ids],
        method=kvq_jax.dense(),
        max_new_tokens=6,
        capacity=256,
        sampling=kvq_jax.Sampling(1.5),
        seed=len(ids),  # else all answers would be drawn alike
    )
    return made.texts[0]


def test_history_is_kept_until_reset(chat, tiny):
    model = load(tiny)
    first = [{"role": "user", "content": "hello"}]
    one = answer(model, first)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "more"}]
    two = answer(model, second)
    assert one != two
    result = chat("hello", "", "more", "/reset", "hello", "/exit", "never read")
    assert result.code == 0
    assert result.out == f"{one}\n{two}\n{one}\n\n"
    assert "the conversation is forgotten" in result.err


def test_system_prompt_comes_first_and_survives_reset(chat, tiny):
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hello"}]
    expected = answer(load(tiny), messages)
    result = chat("hello", "/reset", "hello", options=(*SHORT, "--system", "brief"))
    assert result.out == f"{expected}\n{expected}\n\n"


def test_end_of_input_and_unknown_commands(chat):
    result = chat("/help")
    assert (result.code, result.out) == (0, "\n")
    words = " ".join(result.err.split())  # a long path wraps the line
    assert words.count("/reset forgets the conversation, /exit ends it") == 2


def test_full_cache_is_said_and_survived(chat):
    result = chat("x" * 300, "hello", options=SHORT)
    assert result.code == 0
    assert "the cache 256: /reset" in result.err
    assert len(result.out.splitlines()) >= 2


@pytest.mark.parametrize("where", ["builtins.input", "kvq_jax.decoding.generation.stream"])
def test_interrupt_ends_it(chat, monkeypatch, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    result = chat("hello")
    assert result.code == 0
    assert "Traceback" not in result.err


def test_wrong_calls(chat):
    assert chat(options=("--method", "foo")).code == 2
    assert chat(options=("--top-k", 5, "--temperature", 0)).code == 2
    assert chat(model="no-such-model").code == 1


def test_model_without_template_exits_1(chat, tiny, tmp_path):
    for file in tiny.iterdir():
        if file.name != "tokenizer_config.json":
            (tmp_path / file.name).symlink_to(file)
    result = chat("hello", model=tmp_path)
    assert result.code == 1
    assert "no chat template" in result.err
