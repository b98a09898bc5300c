# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: imports point one way, packages are listed, names agree."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvq_jax as kvq
from tests.methods import cases

ROOT = Path(__file__).parent.parent
SOURCES = {"kvq_jax": ROOT / "kvq_jax", "kvq_jax.kernels": ROOT / "kernels",
           "kvq_jax.models": ROOT / "models"}  # fmt: skip

# From the bottom to the top: a module may import its own part and those before it.
ORDER = ["base", "packing", "sums", "rope", "codecs", "kernels", "engines", "methods"]
ALLOWED = {part: set(ORDER[: i + 1]) for i, part in enumerate(ORDER)}
ALLOWED["base"] = {"base"}
ALLOWED["packing"] = {"packing"}
ALLOWED["sums"] = {"sums"}
ALLOWED["rope"] = {"rope"}
ALLOWED["rows"] = {"base", "rows"}
ALLOWED["sharding"] = {"base", "engines", "sharding"}
ALLOWED["models"] = {"base", "rope", "models"}
ALLOWED["aot"] = {"aot"}
TOP = {"fitting", "measure", "decoding", "fits", "cli"}
# Parts of these that import nothing of the project: anything may import them.
LEAVES = {"kvq_jax.fitting", "kvq_jax.fitting.allocation"}


def modules():
    """All modules by name, with their files."""
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = file
    return found


def imported(file):
    """Names of the project's modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    wrong = []
    for name, file in modules().items():
        part = name.split(".")[1] if "." in name else "kvq_jax"
        if part == "kvq_jax" or part in TOP:
            continue
        for other in imported(file):
            target = other.split(".")
            if other.rpartition(".")[0] in LEAVES:
                continue
            if target[0] == "kvq_jax" and target[1] not in ALLOWED[part]:
                wrong.append(f"{name} imports {other}")
    wrong += [x for x in LEAVES for y in imported(modules()[x]) if y.startswith("kvq_jax")]
    assert not wrong
    assert any("kvq_jax.base" in x for x in imported(ROOT / "kvq_jax/engines/window.py"))


def test_core_imports_without_flax():
    code = "import kvq_jax, sys; kvq_jax.ott(); assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["kernels", "models"])
def test_folders_do_not_import_under_their_own_name(name):
    code = f"import {name}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode and f"import kvq_jax.{name}" in run.stderr


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name for name, file in modules().items() if file.name == "__init__.py"}
    assert set(listed["packages"]) == found
    for package, folder in listed["package-dir"].items():
        assert SOURCES[package] == ROOT / folder


@pytest.mark.parametrize("file", sorted((ROOT / "kvq_jax/methods").glob("[!_]*.py")))
def test_every_method_is_documented_exported_and_in_the_matrix(file):
    name = file.stem
    assert name in kvq.methods.__all__
    assert name in kvq.__all__
    assert any(case.split("-")[0] == name for case in cases.CASES)
    doc = ast.get_docstring(ast.parse(file.read_text()))
    for part in ("Idea:", "Parts:", "Bytes of a state"):
        assert part in doc, part
    if name != "dense":
        assert "Reference:" in doc
        assert "Differs from the paper" in doc
    assert f"`{name}`" in (ROOT / "README.md").read_text()
