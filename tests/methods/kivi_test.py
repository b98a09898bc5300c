# SPDX-License-Identifier: Apache-2.0
"""KIVI's codes against those of its authors' code, on real keys and values."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import kvq_jax as kvq
from kvq_jax import packing
from kvq_jax.codecs import Affine

GOLDEN = np.load(Path(__file__).parent / "golden" / "kivi.npz")

settings = pytest.mark.parametrize(
    "kind, layer, bits, group",
    [(k, n, b, g) for k in "kv" for n in (0, 19) for b in (2, 4) for g in (32, 64)],
)


def golden(kind, layer, bits, group, dtype):
    """The authors' fields `K T H`, scale and minimum `K tiles`, and dequantized values or None."""
    prefix = f"{kind}{layer}_b{bits}_g{group}_{dtype}"
    words = GOLDEN[f"{prefix}_code"].view(np.uint32)
    axis = 1 if kind == "k" else 2
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = np.expand_dims(words, axis + 1) >> np.expand_dims(
        shifts, tuple(range(1, 3 - axis))
    ) & np.uint32(2**bits - 1)
    fields = fields.reshape(GOLDEN[f"{kind}{layer}"].shape)
    shape = (3, 512 // group, 64) if kind == "k" else (3, 512, 64 // group)
    scale, minimum = (GOLDEN[f"{prefix}_{name}"].reshape(shape) for name in ("scale", "mn"))
    deq = f"{prefix}_deq"
    return fields, scale, minimum, GOLDEN.get(deq)


def spread(x, shape):
    """Repeats a value of each tile over its elements."""
    return np.repeat(np.repeat(x, shape[1] // x.shape[1], 1), shape[2] // x.shape[2], 2)


def codec(kind, bits, group, **options):
    """The codec that `kivi` uses."""
    method = kvq.kivi(bits=bits, group_size=group)
    chosen = method.key_codec if kind == "k" else method.value_codec
    return Affine(chosen.bits, chosen.tile, **options)


def our_fields(code, kind, bits, group):
    """Fields in the order of tokens; keys were encoded a group at a time."""
    fields = np.asarray(packing.unpack(code.words, bits))
    return fields.reshape(3, 512, 64)


def encode(kind, codec, x, group):
    """Encodes keys group by group, as the cache does; values whole."""
    if kind == "k":
        x = x.reshape(3, 512 // group, group, 64)
    code = codec.encode(jnp.asarray(x))
    return code, np.asarray(codec.decode(code, jnp.float32)).reshape(3, 512, 64)


@settings
def test_float32_arithmetic_is_the_authors(kind, layer, bits, group):
    """With exact scales the codes are the same but where x lies on a rounding boundary."""
    x = GOLDEN[f"{kind}{layer}"].astype(np.float32)
    fields, scale, minimum, _ = golden(kind, layer, bits, group, "f32")
    exact = codec(kind, bits, group, scale_dtype=jnp.float32)
    code, decoded = encode(kind, exact, x, group)
    np.testing.assert_allclose(np.asarray(code.scale).reshape(scale.shape), scale, rtol=3e-7)
    np.testing.assert_array_equal(np.asarray(code.minimum).reshape(minimum.shape), minimum)
    ours = our_fields(code, kind, bits, group)
    assert_equal_but_for_ties(ours, fields, x, spread(scale, x.shape), spread(minimum, x.shape), 0)
    theirs = fields * spread(scale, x.shape) + spread(minimum, x.shape)
    same = ours == fields
    np.testing.assert_allclose(decoded[same], theirs[same], rtol=1e-5, atol=1e-5)
    # Teeth: another head's codes are not these.
    assert (ours != fields[::-1]).mean() > 0.1


@settings
def test_stored_codes_differ_from_the_authors_by_the_rounding_of_scales(kind, layer, bits, group):
    """The default codec against the authors' float16 arithmetic."""
    x = GOLDEN[f"{kind}{layer}"].astype(np.float32)
    fields, scale, minimum, deq = golden(kind, layer, bits, group, "f16")
    scale, minimum = (spread(a.astype(np.float32), x.shape) for a in (scale, minimum))
    code, decoded = encode(kind, codec(kind, bits, group), x, group)
    ours = our_fields(code, kind, bits, group)
    # Either scale may be one float16 ulp off, and theirs divides in float16.
    eps = float(jnp.finfo(jnp.float16).eps)
    assert_equal_but_for_ties(ours, fields, x, scale, minimum, 4 * eps)
    same = ours == fields
    theirs = fields * scale + minimum if deq is None else deq.astype(np.float32)
    error = np.abs(decoded - theirs)[same]
    bound = (4 * eps * (np.abs(minimum) + 2**bits * scale))[same]
    assert (error <= bound).all()


def assert_equal_but_for_ties(ours, theirs, x, scale, minimum, relative):
    """Fields may differ by one where (x - minimum) / scale is within rounding of n + 1/2."""
    exact = (x - minimum) / scale
    distance = np.abs(exact - np.floor(exact) - 0.5)
    differ = ours != theirs
    assert differ.mean() < 1e-2
    assert (np.abs(ours.astype(int) - theirs)[differ] <= 1).all()
    slack = relative * (np.abs(x) + np.abs(minimum)) / scale + relative * exact + 1e-4
    assert (distance <= slack)[differ].all()


def test_cache_holds_those_codes():
    """What `append` writes is what the codecs make of each group."""
    k, v = (
        jnp.asarray(GOLDEN[f"{kind}19"].astype(np.float32)).swapaxes(0, 1)[None] for kind in "kv"
    )
    method = kvq.kivi(group_size=32, residual_length=0)
    state = method.append(method.init(kvq.CacheSpec(1, 3, 512, 64, jnp.float32)), k, v)
    num_coded = int(state.coded.num_coded[0])
    assert num_coded == 480
    kv = method.read(state)
    for kind, read, chosen in (
        ("k", kv.keys, method.key_codec),
        ("v", kv.values, method.value_codec),
    ):
        x = GOLDEN[f"{kind}19"].astype(np.float32)
        groups = jnp.asarray(x.reshape(3, 16, 32, 64))
        expected = chosen.decode(chosen.encode(groups), jnp.float32).reshape(3, 512, 64)
        np.testing.assert_array_equal(read[0, :, :num_coded], expected[:, :num_coded])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 9}, "bits must be one of"),
        ({"value_bits": 0}, "bits must be one of"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"residual_length": -1}, "residual_length must be at least 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kvq.kivi(**options)


def test_value_groups_must_divide_the_head():
    with pytest.raises(ValueError, match="96 channels can't be cut"):
        kvq.kivi(group_size=64).init(kvq.CacheSpec(1, 1, 512, 96))
    kvq.kivi(group_size=64, value_group_size=32).init(kvq.CacheSpec(1, 1, 512, 96))


@pytest.mark.parametrize("method", [kvq.tokennorm, kvq.squat, kvq.kvarn])
def test_methods_made_of_kivi_take_its_group_sizes(method):
    with pytest.raises(ValueError, match="group_size must be one of"):
        method(group_size=48)
