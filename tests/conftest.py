# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: CPU, and no dtype promotion that nobody asked for."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling; LLVM's later passes take a sixth of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


# That take a minute or more, the longest first.
LONG = (
    "contract_test.py",
    "calls_test.py",
    "mosaic_tpu_test.py",
    "tpu_step_test.py",
    "window_test.py",
    "layout_test.py",
    "generation_test.py",
    "evaluate_test.py",
    "sharding_test.py",
    "decode_attention_test.py",
    "decoder_test.py",
)


def pytest_collection_modifyitems(items):
    """Puts long files first, so that processes that share the files end together."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go_with_their_module():
    """Frees them: XLA:CPU maps memory for each, and a process may have 65530 mappings."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """Returns a function that gives a fresh random key at each call."""
    keys = iter(jax.random.split(jax.random.key(20250510), 1000))
    return lambda: next(keys)


@pytest.fixture
def as_users_run_it():
    """Turns the annotations' checks off, which see bad input before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
