# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest

import kvq_jax
from kvq_jax.cli import main


def test_entry_point():
    (script,) = entry_points(group="console_scripts", name="kvq")
    assert script.load() is main


def test_version(kvq):
    result = kvq("--version")
    assert result.code == 0
    assert result.out.startswith(f"kvq-jax {version('kvq-jax')} (jax ")


def test_help(kvq):
    result = kvq("--help")
    assert result.code == 0
    for command in ("demo", "generate", "chat", "eval", "calibrate", "inspect", "fits", "methods"):
        assert f" {command} " in result.out
        assert kvq(command, "--help").code == 0


def test_no_command_shows_help(kvq):
    result = kvq()
    assert result.code == 2
    assert "demo" in result.out + result.err
    assert "error" not in result.err


@pytest.mark.parametrize("arguments", [("nonsense",), ("generate",), ("--nonsense",)])
def test_wrong_calls_exit_2(kvq, arguments):
    result = kvq(*arguments)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 2


def test_methods(kvq):
    rows = json.loads(kvq("methods", "--json").out)
    names = [row["method"] for row in rows]
    assert names == [name for name in kvq_jax.methods.__all__ if name.islower()]
    assert all(row["title"] and row["idea"] for row in rows)
    assert rows[names.index("ott")]["defaults"]["num_outliers"] == 3
    shown = kvq("methods")
    assert shown.code == 0
    for row in rows:
        assert row["title"] in " ".join(shown.out.split())


def test_help_does_not_wait_for_what_commands_need():
    code = (
        "import sys, kvq_jax.cli; kvq_jax.cli.main(['eval', '--help']); "
        "assert not {'flax', 'matplotlib', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"]])
def test_closed_pipe_is_quiet(arguments):
    code = f"import sys, kvq_jax.cli; sys.exit(kvq_jax.cli.main({arguments}))"
    # Buffered, so that the pipe is found closed at the end.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = ["bash", "-c", '"$0" -c "$1" | true', sys.executable, code]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.stderr == ""
