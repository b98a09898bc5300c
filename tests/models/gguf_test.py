# SPDX-License-Identifier: Apache-2.0
import json
import os
import struct
import time

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file

from kvq_jax import dense
from kvq_jax.models import init_states, load, load_decoder
from kvq_jax.models.families import GGUF_NAMES, HUGGING_FACE_NAMES
from kvq_jax.models.gguf import GGUFCheckpoint
from kvq_jax.models.gguf_header import read_header


def permute(rows, num_heads):
    """What llama.cpp's converter does to query and key rows, written as it is described."""
    head_dim = rows.shape[0] // num_heads
    order = [
        head * head_dim + half * (head_dim // 2) + pair
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return rows[order]


def gguf_names():
    """Hugging Face name -> GGUF name for two layers."""
    return {
        HUGGING_FACE_NAMES[parameter].format(layer): name.format(layer)
        for parameter, name in GGUF_NAMES.items()
        for layer in range(2)
    }


@pytest.fixture
def convert(golden, tmp_path):
    """Returns a function that writes a golden family as a GGUF file."""

    def write(family, *, spoil=None, endianess=gguf.GGUFEndian.LITTLE, quantization=None):
        folder = golden / "families" / family
        config = json.loads((folder / "config.json").read_text())
        architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
        path = tmp_path / f"{family}.gguf"
        writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        if "head_dim" in config:
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        tensors = {
            gguf_names()[name]: tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        if architecture == "llama":
            for name, tensor in tensors.items():
                if name.endswith("attn_q.weight"):
                    tensors[name] = permute(tensor, config["num_attention_heads"])
                elif name.endswith("attn_k.weight"):
                    tensors[name] = permute(tensor, config["num_key_value_heads"])
        if spoil is not None:
            spoil(tensors)
        for name, tensor in tensors.items():
            if quantization is None or tensor.ndim == 1:
                writer.add_tensor(name, tensor)
            else:
                packed = gguf.quants.quantize(tensor, quantization)
                writer.add_tensor(name, packed, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def logits_of(decoder, ids):
    cache = dense()
    states = init_states(decoder.config, cache, *ids.shape)
    return decoder.logits(decoder.prefill(jnp.asarray(ids), states, cache)[0])


@pytest.mark.parametrize("family", ["llama", "qwen2_qkv_bias", "qwen3_qk_norm"])
def test_gguf_equals_transformers(convert, golden, family):
    data = np.load(golden / "families" / family / "logits.npz")
    logits = logits_of(load_decoder(convert(family)), data["ids"])
    scale = np.abs(data["logits"]).max()
    np.testing.assert_allclose(logits, data["logits"], rtol=1e-4, atol=1e-4 * scale)


def test_gguf_rope_divisors_equal_transformers(convert, golden):
    folder = golden / "families" / "llama_rope_llama3"
    data = np.load(folder / "logits.npz")
    divisors = np.array(load_decoder(folder).config.rope_divisors, np.float32)

    def add(tensors):
        tensors["rope_freqs.weight"] = divisors

    logits = logits_of(load_decoder(convert("llama_rope_llama3", spoil=add)), data["ids"])
    scale = np.abs(data["logits"]).max()
    np.testing.assert_allclose(logits, data["logits"], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantized_tensors_are_within_a_step(convert, golden, quantization):
    path = convert("llama", quantization=GGMLQuantizationType[quantization])
    checkpoint = GGUFCheckpoint(path)
    original = load_file(golden / "families" / "llama" / "model.safetensors")
    # Relative to a block's largest magnitude: half an ulp; half a step, and Q4_0's uneven
    # range makes that a whole one.
    bound = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254, "Q4_0": 1 / 8, "Q4_1": 1 / 15}
    bound["Q5_1"] = 1 / 31
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.1.{name}.weight"
        expected = original[name]
        tensor = checkpoint.read(gguf_names()[name])
        assert tensor.dtype == np.float32
        error = np.abs(tensor - expected).max()
        assert error <= 1.01 * bound[quantization] * np.abs(expected).max()


def test_smollm2_file_is_the_golden_one(smollm2):
    config = smollm2.config
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.rope_theta, config.tie_embeddings) == (64, 1e5, True)


def remove(tensors):
    del tensors["blk.1.ffn_up.weight"]


def add(tensors):
    tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)


def transpose(tensors):
    tensors["blk.0.attn_k.weight"] = np.ascontiguousarray(tensors["blk.0.attn_k.weight"].T)


def drop_embedding(tensors):
    del tensors["token_embd.weight"]


def make_integers(tensors):
    tensors["blk.0.ffn_up.weight"] = np.ones((96, 64), np.int32)


def shorten_divisors(tensors):
    tensors["rope_freqs.weight"] = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, r"missing tensor 'blk\.1\.ffn_up\.weight'"),
        (add, r"unexpected tensor 'blk\.0\.attn_q\.bias'"),
        (transpose, r"'blk\.0\.attn_k\.weight' is \[64, 32\], its config says \[32, 64\]"),
        (drop_embedding, r"missing: token_embd\.weight"),
        (make_integers, "is I32, which the gguf package cannot dequantize"),
        (shorten_divisors, "rope_divisors needs head_dim // 2 = 8 numbers, got 3"),
    ],
)
def test_wrong_tensors_are_refused(convert, spoil, message):
    path = convert("llama", spoil=spoil)
    with pytest.raises(ValueError, match=message) as error:
        load_decoder(path)
    assert str(path) in str(error.value)


def test_truncated_files_are_refused(convert, tmp_path):
    whole = convert("llama").read_bytes()
    path = tmp_path / "short.gguf"
    # In the magic, the counts, the metadata, the tensor infos, and the tensors.
    for size in (0, 3, 10, 30, 100, 500, 1500, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"short\.gguf: damaged or not GGUF"):
            load_decoder(path)


def test_lying_headers_are_refused(convert, tmp_path):
    whole = bytearray(convert("llama").read_bytes())
    path = tmp_path / "lies.gguf"

    def check(position, value, size=8):
        lies = whole.copy()
        lies[position : position + size] = value.to_bytes(size, "little")
        path.write_bytes(lies)
        with pytest.raises(ValueError, match=r"lies\.gguf: damaged or not GGUF"):
            load_decoder(path)

    check(0, 0x46554746, 4)  # the magic
    check(4, 99, 4)  # the version
    for huge in (2**40, 2**63):
        check(8, huge)  # the number of tensors
        check(16, huge)  # the number of keys
        check(24, huge)  # the length of the first key
    name = b"blk.0.attn_q.weight"
    info = whole.index(name) + len(name)
    check(info, 2**31, 4)  # its number of axes
    check(info + 4, 2**40)  # its first axis
    check(info + 20, 250, 4)  # its type
    check(info + 24, 2**40)  # its offset


def offset_of(whole, tensor):
    """Where in the file the offset of a tensor of two axes stands."""
    return whole.index(tensor) + len(tensor) + 4 + 2 * 8 + 4


def test_tensors_that_overlap_or_leave_gaps_are_refused(convert, tmp_path):
    whole = bytearray(convert("llama").read_bytes())
    path = tmp_path / "moved.gguf"
    first, second = (offset_of(whole, f"blk.{i}.ffn_up.weight".encode()) for i in (0, 1))
    offset, other = (int.from_bytes(whole[i : i + 8], "little") for i in (first, second))
    for wrong in (other, offset + 1, offset - 1, offset + 32, offset - 32, 0, 2**63, 2**64 - 32):
        moved = whole.copy()
        moved[first : first + 8] = wrong.to_bytes(8, "little")
        path.write_bytes(moved)
        with pytest.raises(ValueError, match=r"moved\.gguf: damaged .*'blk\.0\.ffn_up\.weight'"):
            GGUFCheckpoint(path)
    swapped = whole.copy()
    swapped[first : first + 8], swapped[second : second + 8] = (
        whole[second : second + 8],
        whole[first : first + 8],
    )
    path.write_bytes(swapped)
    with pytest.raises(ValueError, match="without gap or overlap"):
        GGUFCheckpoint(path)
    # As after a wrong alignment, which moves all tensors.
    path.write_bytes(whole + bytes(32))
    with pytest.raises(ValueError, match="the last tensor ends at byte"):
        GGUFCheckpoint(path)


def test_a_damaged_header_never_gives_other_weights(convert, tmp_path):
    source = convert("llama", quantization=GGMLQuantizationType.Q8_0)
    whole = source.read_bytes()
    tensors = GGUFCheckpoint(source)
    weights = {name: tensors.read(name) for name in tensors.shapes}
    start = whole.index(b"token_embd.weight") - 8
    end = max(whole.index(name.encode()) for name in weights) + 40
    path = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(0)
    num_loaded = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(start, end)] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            checkpoint = GGUFCheckpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        # A damaged name is refused when the decoder is filled; the others must be as they were.
        for name in set(checkpoint.shapes) & set(weights):
            np.testing.assert_array_equal(checkpoint.read(name), weights[name])
        num_loaded += set(checkpoint.shapes) == set(weights)
    assert num_loaded == 0


def with_keys(*pairs):
    """A GGUF file without tensors; pairs of a key and its encoded value."""
    keys = b"".join(text(key) + value for key, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + keys


def text(value):
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def array(kind, count, content):
    return struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, count) + content


def test_each_type_of_value_is_read():
    # In the order of the format's types; 8 is a string and 9 an array.
    forms = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    values = {0: 200, 1: -3, 2: 60000, 3: -300, 4: 2**31, 5: -5, 6: 0.5, 7: True}
    values |= {10: 2**63, 11: -(2**40), 12: 0.1}
    encoded = {kind: struct.pack(f"<{form}", values[kind]) for kind, form in forms.items()}
    encoded[8], values[8] = text("ü"), "ü"
    keys = [(f"x{kind}", struct.pack("<I", kind) + value) for kind, value in encoded.items()]
    keys += [(f"y{kind}", array(kind, 2, 2 * value)) for kind, value in encoded.items()]
    metadata, tensors = read_header(memoryview(with_keys(*keys)))
    assert not tensors
    for kind, value in values.items():
        assert metadata[f"x{kind}"] == value
        assert type(metadata[f"x{kind}"]) is type(value)
        assert metadata[f"y{kind}"] == [value, value]


def test_arrays_take_bounded_time_and_memory():
    uint8, string = gguf.GGUFValueType.UINT8, gguf.GGUFValueType.STRING
    mega = 1 << 20
    start = time.monotonic()
    metadata, _ = read_header(memoryview(with_keys(("a", array(uint8, 4 * mega, bytes(4 * mega))))))
    assert metadata == {"a": [0] * (4 * mega)}
    metadata, _ = read_header(memoryview(with_keys(("a", array(string, mega, bytes(8 * mega))))))
    assert metadata == {"a": [""] * mega}
    half = ("a", array(uint8, 2 * mega + 1, bytes(2 * mega + 1)))
    for keys in (
        [("a", array(uint8, 5 * mega, bytes(5 * mega)))],
        [half, ("b", half[1])],
        [("a", array(string, 2**63, b""))],
    ):
        with pytest.raises(ValueError, match=r"key '.': an array of \d+ items; .* 4194304 in all"):
            read_header(memoryview(with_keys(*keys)))
    with pytest.raises(ValueError, match="key 'a': a field ends at byte"):
        read_header(memoryview(with_keys(("a", array(uint8, 1000, b"1")))))
    with pytest.raises(ValueError, match="the header is larger than 64 MiB"):
        read_header(
            memoryview(with_keys(("a", struct.pack("<IQ", string, 65 * mega) + bytes(65 * mega))))
        )
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([("a", struct.pack("<IB", 0, 1))] * 2, "key 'a' occurs twice"),
        ([("a", array(9, 1, array(0, 1, b"1")))], "an array of arrays is not supported"),
        ([("a", struct.pack("<I", 99))], "key 'a': 99 is not a valid GGUFValueType"),
        ([("a", struct.pack("<IQ", 8, 1) + b"\xff")], "key 'a': 'utf-8' codec"),
        ([("general.alignment", struct.pack("<II", 4, 48))], "general.alignment must be a power"),
        ([("general.alignment", struct.pack("<II", 4, 0))], "general.alignment must be a power"),
        ([("general.alignment", struct.pack("<If", 6, 32))], "general.alignment must be a power"),
    ],
)
def test_bad_metadata_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        read_header(memoryview(with_keys(*keys)))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(ValueError, match=r"fifo\.gguf: not a regular file"):
        load_decoder(tmp_path / "fifo.gguf")


def claim_layers(path, num_layers):
    """Changes the number of layers that a GGUF file states."""
    whole = bytearray(path.read_bytes())
    key = b"llama.block_count"
    at = whole.index(key) + len(key) + 4
    whole[at : at + 4] = struct.pack("<I", num_layers)
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("num_layers", "message"),
    [
        (3000, r"missing tensor 'blk\.2\.attn_norm\.weight', with llama\.block_count=3000"),
        (1, r"unexpected tensor 'blk\.1\.attn_norm\.weight', with llama\.block_count=1"),
        (10**9, r"llama\.block_count must be at most 10000"),
    ],
)
def test_another_number_of_layers_is_refused_at_once(convert, num_layers, message):
    path = convert("llama")
    claim_layers(path, num_layers)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load_decoder(path)
    assert time.monotonic() - start < 2


def test_big_endian_is_refused(convert):
    path = convert("llama", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="only little-endian"):
        load_decoder(path)


def test_a_file_without_tokenizer_is_refused_by_load(convert):
    with pytest.raises(ValueError, match="tokenizer None is not supported"):
        load(convert("llama"))
