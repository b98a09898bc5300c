# SPDX-License-Identifier: Apache-2.0
"""The examples of the README and of docstrings run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import kvq_jax as kvq

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_quickstart_runs_and_is_short():
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(EXAMPLES[0], names)
    assert names["out"].shape == (2, 1, 8, 64)
    assert names["states"][0].length.tolist() == [1, 1]
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 12


def test_whole_model_example_runs(capsys):
    exec(EXAMPLES[1], {"kvq": kvq})
    assert "Paris" in capsys.readouterr().out


def modules_with_examples():
    names = [kvq.__name__]
    for module in pkgutil.walk_packages(kvq.__path__, "kvq_jax."):
        source = importlib.util.find_spec(module.name).origin
        if source and ">>>" in Path(source).read_text():
            names.append(module.name)
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried or name == "kvq_jax"
