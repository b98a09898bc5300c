# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest

from kvq_jax.models import load


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, loaded once."""
    return load("smollm2")


@pytest.fixture(scope="session")
def golden():
    """The folder of golden data; see its README.md."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def checkpoint(golden, tmp_path):
    """Returns a function that copies a golden family to a folder that may be spoilt."""

    def copy(family, **config):
        """Copies `family`; keyword arguments replace keys of its config."""
        folder = tmp_path / family
        shutil.copytree(golden / "families" / family, folder)
        path = folder / "config.json"
        merged = json.loads(path.read_text()) | config
        path.write_text(json.dumps({k: v for k, v in merged.items() if v is not Remove}))
        return folder

    return copy


class Remove:
    """Stands for a key to be removed."""


@pytest.fixture
def remove():
    """The value that makes `checkpoint` remove a key of the config."""
    return Remove
