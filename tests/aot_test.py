# SPDX-License-Identifier: Apache-2.0
import functools
import importlib.util
import os
import platform
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from kvq_jax import aot

# There is no libtpu for other machines.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="libtpu is for x86-64 Linux"
)

CACHE = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
TOKEN = jax.ShapeDtypeStruct((1024,), jnp.bfloat16)
MATRIX = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
CACHE_BYTES = 4096 * 1024 * 2


def write(position, cache, token):
    return jax.lax.dynamic_update_index_in_dim(cache, token, position, 0)


def add_one(x):
    return x + 1


def to_three(x):
    return x.reshape(3)


def die_of_a_check(x):
    for line in (
        "E0101 a.cc:1] RAW: dumping core",
        "W0101 b.cc:2] odd",
        *["F0101 c.cc:3] No."] * 2,
    ):
        print(line, file=sys.stderr, flush=True)
    os.abort()


def die_silently(x):
    print("the last words", flush=True)
    os._exit(7)


def sharded_matmul(x, y):
    columns, rows = PartitionSpec(None, "tp"), PartitionSpec("tp")
    return jax.shard_map(
        lambda x, y: jax.lax.psum(x @ y, "tp"), in_specs=(columns, rows), out_specs=PartitionSpec()
    )(x, y)


def double(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((256, 1024), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // 256,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="double",
    )(x)


def test_cycles_are_foretold():
    x, y = (jax.ShapeDtypeStruct((n, 1024), jnp.float32) for n in (1024, 8192))
    short, long = (aot.simulate("v5e", double, z, kernel="double") for z in (x, y))
    # Each step loads, multiplies and stores 256 registers; the loop is one program.
    assert short.bundles == long.bundles > 256
    assert short.uses["VALU"] >= 256 and short.capacity["VALU"] == 4
    steps = 8192 // 256 - 1024 // 256
    assert 256 < (long.cycles - short.cycles) / steps < 10_000
    with pytest.raises(ValueError, match="0 kernels of the name 'triple'"):
        aot.simulate("v5e", double, x, kernel="triple")


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_donated_cache_is_updated_in_place(chip):
    compiled = aot.compile_for(chip, functools.partial(write, 7), CACHE, TOKEN, donate_argnums=0)
    assert (compiled.chip, compiled.num_devices) == (chip, 1)
    assert compiled.argument_bytes - CACHE_BYTES == TOKEN.size * 2
    assert compiled.alias_bytes == compiled.output_bytes == CACHE_BYTES
    assert compiled.temp_bytes < CACHE_BYTES / 100
    assert CACHE_BYTES < compiled.peak_bytes < 1.01 * CACHE_BYTES
    assert compiled.code_bytes > 0
    assert compiled.seconds > 0
    assert "dynamic-update-slice" in compiled.hlo
    assert compiled.hlo not in repr(compiled)


def test_without_donation_there_are_two_caches():
    compiled = aot.compile_for("v5e", functools.partial(write, 7), CACHE, TOKEN)
    assert compiled.alias_bytes == 0
    assert compiled.peak_bytes > 2 * CACHE_BYTES


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_what_does_not_fit_is_an_answer_and_tells_the_memory(chip):
    huge = jax.ShapeDtypeStruct((2**37 // 1024, 1024), jnp.int8)
    with pytest.raises(aot.DoesNotFit, match="RESOURCE_EXHAUSTED") as caught:
        aot.compile_for(chip, add_one, huge, donate_argnums=0)
    assert 2**37 <= caught.value.required_bytes < 2.1 * 2**37
    # Both are to a hundredth of a GiB.
    assert caught.value.available_bytes == aot.CHIPS[chip].hbm_bytes


def test_a_mesh():
    specs = PartitionSpec(None, "tp"), PartitionSpec("tp")
    compiled = aot.compile_for("v5e", sharded_matmul, MATRIX, MATRIX, mesh={"tp": 4}, specs=specs)
    assert compiled.num_devices == 4
    assert compiled.argument_bytes == 2 * MATRIX.size * 2 / 4
    assert compiled.output_bytes == MATRIX.size * 2
    assert "all-reduce" in compiled.hlo


def test_specs_default_to_copies():
    one, four = (aot.compile_for("v5e", add_one, MATRIX, mesh={"tp": n}) for n in (1, 4))
    assert one.argument_bytes == four.argument_bytes == MATRIX.size * 2


def test_a_failed_check_is_told():
    with pytest.raises(aot.CompileError) as caught:
        aot.compile_for("v5e", die_of_a_check, TOKEN)
    assert str(caught.value) == (
        "the compiler for v5e died (SIGABRT) of this program\nF0101 c.cc:3] No."
    )


def test_another_death_is_told_by_its_last_words():
    with pytest.raises(aot.CompileError, match=r"v5e died \(exit code 7\) .*\n(.*\n)*the last wor"):
        aot.compile_for("v5e", die_silently, TOKEN)


def test_an_exception_in_the_function_is_told_with_its_place():
    with pytest.raises(aot.CompileError, match="v5e failed: TypeError: cannot reshape") as caught:
        aot.compile_for("v5e", to_three, TOKEN)
    assert not isinstance(caught.value, aot.DoesNotFit)
    assert "in to_three" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "message, memory",
    [
        ("RESOURCE_EXHAUSTED: Used 23.51G of 15.75G hbm. Exceeded", (23.51, 15.75)),
        ("temporaries (512.00M) exceeds available HBM (15.75G)", (0.5, 15.75)),
        ("RESOURCE_EXHAUSTED: CompileTimeScopedVmemOom: limit (16.00M) of vmem", None),
    ],
)
def test_only_hbm_is_what_a_program_fits_into(message, memory):
    error = aot._error("v5e", "JaxRuntimeError", message, "")
    assert isinstance(error, aot.DoesNotFit) == (memory is not None)
    if memory:
        found = error.required_bytes, error.available_bytes
        assert found == tuple(int(x * 2**30) for x in memory)


@pytest.mark.parametrize(
    "arguments, keywords, message",
    [
        (("v9", add_one, TOKEN), {}, "unknown chip 'v9': choose from v4, v5e, v5p, v6e, 7x"),
        (("v5e", add_one, TOKEN), {"mesh": {"tp": 3}}, "3 devices; v5e has 1, 2, 4, 8"),
        (("v5e", add_one, TOKEN), {"specs": ()}, "0 specs for 1 arguments"),
        (("v5e", lambda x: x, TOKEN), {}, "top level of an importable module"),
    ],
)
def test_wrong_calls(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        aot.compile_for(*arguments, **keywords)


def test_functions_of_a_script_are_refused(monkeypatch):
    monkeypatch.setattr(add_one, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "add_one", add_one, raising=False)
    with pytest.raises(ValueError, match="__main__ is another module there"):
        aot.compile_for("v5e", add_one, TOKEN)


def test_waiting_ends():
    with pytest.raises(TimeoutError, match=r"v5e was not done after 0\.1 seconds"):
        aot.compile_for("v5e", add_one, TOKEN, timeout=0.1)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
        aot.compile_for("v5e", add_one, TOKEN)
