# SPDX-License-Identifier: Apache-2.0
import json
import time

import numpy as np
import pytest

from kvq_jax.models import DecoderConfig, load_decoder
from kvq_jax.models.families import (
    FAMILIES,
    GGUF_ARCHITECTURES,
    config_from_gguf,
    config_from_hugging_face,
)

# Golden folder -> what its refusal must name.
REFUSED = {
    "cohere2": "'Cohere2ForCausalLM' is not supported",
    "deepseek_v2_mla": "'DeepseekV2ForCausalLM' is not supported",
    "deepseek_v3_mla": "'DeepseekV3ForCausalLM' is not supported",
    "falcon": "'FalconForCausalLM' is not supported",
    "gemma2": "'Gemma2ForCausalLM' is not supported",
    "gemma3_text": "'Gemma3ForCausalLM' is not supported",
    "gpt_2": "'GPT2LMHeadModel' is not supported",
    "gpt_neox": "'GPTNeoXForCausalLM' is not supported",
    "gpt_oss_sinks": "'GptOssForCausalLM' is not supported",
    "granite": "'GraniteForCausalLM' is not supported",
    "llama_rope_yarn": "rope type 'yarn' is not implemented",
    "mixtral": "'MixtralForCausalLM' is not supported",
    "olmo2_post_norm_qk_norm": "'Olmo2ForCausalLM' is not supported",
    "phi3": "'Phi3ForCausalLM' is not supported",
    "qwen3_moe": "'Qwen3MoeForCausalLM' is not supported",
    "smollm3_nope_layers": "'SmolLM3ForCausalLM' is not supported",
    "stablelm": "'StableLmForCausalLM' is not supported",
    "starcoder2": "'Starcoder2ForCausalLM' is not supported",
}


def config_of(golden, family, **changes):
    """The golden config with keys replaced; Ellipsis removes one."""
    config = json.loads((golden / "families" / family / "config.json").read_text())
    return {key: value for key, value in (config | changes).items() if value is not ...}


def read(config):
    return config_from_hugging_face(config, source="x/config.json")


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(golden, family):
    # Only the config is there: a refusal comes before any weight is looked for.
    with pytest.raises(ValueError, match=REFUSED[family]) as error:
        load_decoder(golden / "families" / family)
    assert "config.json" in str(error.value)
    assert "supported: " in str(error.value)


def test_every_golden_family_is_loaded_or_refused(golden):
    loaded = {path.parent.name for path in golden.glob("families/*/model.safetensors")}
    assert loaded | set(REFUSED) == {path.name for path in golden.glob("families/*")}
    assert {config_of(golden, name)["architectures"][0] for name in loaded} == set(FAMILIES)


def test_each_field_is_read(golden):
    assert read(config_of(golden, "mistral_swa")) == DecoderConfig(
        vocab_size=128,
        width=64,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=96,
        max_length=256,
        norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=8,
    )


@pytest.mark.parametrize(
    ("family", "changes", "field", "value"),
    [
        ("llama", {"tie_word_embeddings": ...}, "tie_embeddings", False),
        ("llama", {"head_dim": ...}, "head_dim", 16),
        ("llama", {"head_dim": None}, "head_dim", 16),
        ("llama", {"num_key_value_heads": ...}, "num_kv_heads", 4),
        ("llama", {"attention_bias": True}, "qkv_bias", True),
        ("llama", {"attention_bias": True}, "o_bias", True),
        ("llama", {"mlp_bias": True}, "mlp_bias", True),
        ("llama", {"hidden_act": ...}, "mlp_width", 96),
        ("mistral_swa", {"sliding_window": ...}, "sliding_window", 4096),
        ("mistral_swa", {"sliding_window": None}, "sliding_window", None),
        ("qwen2_qkv_bias", {"sliding_window": 4096}, "sliding_window", None),
        ("qwen2_qkv_bias", {}, "qkv_bias", True),
        ("qwen2_qkv_bias", {}, "o_bias", False),
        ("qwen3_qk_norm", {"head_dim": ...}, "head_dim", 128),
        ("qwen3_qk_norm", {}, "qk_norm", True),
        # As transformers wrote rope before version 5.
        ("llama", {"rope_parameters": ..., "rope_theta": 5e5}, "rope_theta", 5e5),
        ("llama", {"rope_parameters": ...}, "rope_theta", 1e4),
        ("llama", {"rope_parameters": ..., "rope_scaling": None}, "rope_divisors", None),
    ],
)
def test_left_out_and_older_keys_mean_what_they_mean_in_transformers(
    golden, family, changes, field, value
):
    assert getattr(read(config_of(golden, family, **changes)), field) == value


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_older_rope_scaling_equals_rope_parameters(golden, name):
    config = config_of(golden, "llama_rope_llama3")
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling[name] = scaling.pop("rope_type")
    older = read(config | {"rope_scaling": scaling})
    assert older == read(config_of(golden, "llama_rope_llama3"))
    # Pairs turning more than 4 times in 64 tokens are kept, less than once divided by 8.
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(8) / 8)
    divisors = np.array(older.rope_divisors)
    np.testing.assert_allclose(divisors[wavelengths < 64 / 4], 1.0)
    np.testing.assert_allclose(divisors[wavelengths > 64], 8.0)
    assert ((divisors >= 1) & (divisors <= 8)).all()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_qkv_bias", {"use_mrope": False}),  # Qwen2.5-0.5B
        ("llama_rope_llama3", {"unsloth_fixed": True, "unsloth_version": "2026.3.3"}),
        ("qwen3_qk_norm", {"_attn_implementation_autoset": True}),
        ("llama", {"problem_type": None, "output_attentions": False, "return_dict": True}),
        ("llama", {"pad_token_id": -1, "attn_implementation": "sdpa", "pruned_heads": {}}),
        ("llama", {"id2label": {"0": "LABEL_0"}, "is_decoder": False, "sliding_window": None}),
        ("mistral_swa", {"attention_bias": False, "use_sliding_window": False}),
        ("llama", {"a_key_of_the_future": None}),
    ],
)
def test_bookkeeping_and_switches_that_are_off_change_nothing(golden, family, changes):
    assert read(config_of(golden, family, **changes)) == read(config_of(golden, family))


def test_an_unknown_key_may_be_ignored(golden):
    config = config_of(golden, "llama", colour="blue", shape="round")
    with pytest.raises(ValueError, match=r"colour, shape; .* pass them as ignore_keys"):
        read(config)
    with pytest.raises(ValueError, match=r"unknown key\(s\) for LlamaForCausalLM: shape;"):
        config_from_hugging_face(config, source="x", ignore_keys=["colour"])
    got = config_from_hugging_face(config, source="x", ignore_keys=["colour", "shape"])
    assert got == read(config_of(golden, "llama"))
    # A known key keeps its meaning.
    got = config_from_hugging_face(
        config_of(golden, "llama", mlp_bias=True), source="x", ignore_keys=["mlp_bias"]
    )
    assert got.mlp_bias
    metadata = GGUF | {"llama.colour": "blue"}
    got = config_from_gguf(metadata, SHAPES, None, source="x", ignore_keys=["llama.colour"])
    assert got == read_gguf()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"architectures": ...}, "'architectures' must name one"),
        ("llama", {"architectures": ["A", "B"]}, "'architectures' must name one"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' contradicts"),
        ("llama", {"logit_scale": 2.0}, r"unknown key\(s\) for LlamaForCausalLM: logit_scale"),
        ("llama", {"quantization_config": {}}, "unknown key.*quantization_config"),
        ("llama", {"sliding_window": 8}, "unknown key.*sliding_window"),
        ("qwen2_qkv_bias", {"use_mrope": True}, "unknown key.*use_mrope"),
        ("llama", {"is_encoder_decoder": 0}, "unknown key.*is_encoder_decoder"),
        ("llama", {"partial_rotary_factor": 0.5}, "unknown key.*partial_rotary_factor"),
        ("llama", {f"key_{i:03}": 1 for i in range(500)}, "key_007 and 492 more"),
        ("llama", {"architectures": [["LlamaForCausalLM"]]}, r"\['LlamaForCausalLM'\] is not supp"),
        ("llama", {"eos_token_id": "2"}, "eos_token_id must be an integer or a list of them: '2'"),
        ("llama", {"eos_token_id": [[2]]}, "eos_token_id must be an integer or a list"),
        ("llama", {"eos_token_id": True}, "eos_token_id must be an integer or a list"),
        ("llama", {"eos_token_id": 2.0}, "eos_token_id must be an integer or a list"),
        ("mistral_swa", {"attention_bias": True}, "unknown key.*attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2 is not implemented"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True is not implemented"),
        ("qwen2_qkv_bias", {"use_sliding_window": True}, "use_sliding_window=True is not"),
        ("qwen3_qk_norm", {"layer_types": ["full_attention"]}, "layer_types must be"),
        ("qwen3_qk_norm", {"layer_types": ["sliding_attention"] * 2}, "layer_types must be"),
        ("qwen3_qk_norm", {"layer_types": 2}, "layer_types must be"),
        ("llama", {"hidden_size": ...}, r"missing key\(s\): hidden_size"),
        ("mistral_swa", {"num_key_value_heads": ...}, "missing.*num_key_value_heads"),
        ("llama", {"hidden_size": "64", "head_dim": None}, "hidden_size must be int, got '64'"),
        (
            "llama",
            {"hidden_size": 66, "head_dim": None},
            "hidden_size=66 is not a multiple of num_attention_heads=4",
        ),
        ("llama", {"head_dim": 0}, "head_dim must be a positive integer"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers must be int, got '2'"),
        ("llama", {"vocab_size": True}, "vocab_size must be int, got True"),
        ("llama", {"rms_norm_eps": None}, "norm_eps must be float, got None"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_embeddings must be bool, got 'no'"),
        ("mistral_swa", {"sliding_window": "8"}, "sliding_window must be int or null"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "both rope_parameters and rope_scaling"),
        ("llama", {"rope_theta": 5.0}, "rope_theta is both 5.0 and 10000.0"),
        ("llama", {"rope_parameters": "default"}, "is no object"),
        ("llama", {"rope_parameters": {"rope_type": ["llama3"]}}, "rope type .* not implemented"),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type 'linear' is not implemented; supported: default, llama3",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"exactly the keys \[\], got \['partial_rotary_factor'\]",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "needs exactly the keys"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 0}}, "factor must be a positive number"),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": "1"}}, "rope_theta must be a pos"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "must be below"),
        ("llama", {"rope_parameters": LLAMA3, "head_dim": "8"}, "head_dim must be int"),
        (
            "llama",
            {"rope_parameters": LLAMA3, "head_dim": 10**12},
            "head_dim must be at most",
        ),
        ("mistral_swa", {"sliding_window": 10**12}, "sliding_window must be at most"),
    ],
)
def test_refused_configs(golden, family, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read(config_of(golden, family, **changes))
    assert str(error.value).startswith("x/config.json: ")


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [10**12, 10**300, 0, -1, 2.0, "2", [2], True])
def test_absurd_sizes_are_refused_at_once(golden, key, value):
    layers = ["full_attention"] * 2
    config = config_of(golden, "llama", rope_parameters=LLAMA3, layer_types=layers, **{key: value})
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"x/config\.json: {key} must be") as error:
        read(config)
    assert time.monotonic() - start < 1
    assert len(str(error.value)) < 150


GGUF = {
    "general.architecture": "llama",
    "general.name": "anything",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 1e4,
}
SHAPES = {"token_embd.weight": (128, 64)}


def read_gguf(shapes=None, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in (GGUF | changes).items() if value is not ...}
    return config_from_gguf(metadata, SHAPES if shapes is None else shapes, None, source="x.gguf")


def test_gguf_config_equals_hugging_face(golden):
    assert read_gguf() == read(config_of(golden, "llama"))
    assert not read_gguf(SHAPES | {"output.weight": (128, 64)}).tie_embeddings
    assert read_gguf(llama__attention__head_count_kv=...).num_kv_heads == 4
    assert read_gguf(llama__rope__freq_base=...).rope_theta == 1e4
    assert read_gguf(llama__attention__key_length=32).head_dim == 32
    assert set(GGUF_ARCHITECTURES) == {"llama", "qwen2", "qwen3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "gemma2"}, "GGUF architecture 'gemma2' is not supported"),
        ({"general__architecture": ...}, "GGUF architecture None is not supported"),
        ({"general__type": "adapter"}, "holds a 'adapter', not a model"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"llama__expert_count": 8}, r"unknown key\(s\): llama\.expert_count"),
        ({"llama__rope__scaling__type": "yarn"}, r"unknown key\(s\): llama\.rope\.scaling\.type"),
        ({"llama__block_count": ...}, r"missing: llama\.block_count"),
        ({"shapes": {}}, r"missing: token_embd\.weight"),
        ({"llama__vocab_size": 64}, "llama.vocab_size=64 is not implemented for vocab_size=128"),
        ({"llama__rope__dimension_count": 8}, "dimension_count=8 is not .* head_dim=16"),
        ({"llama__block_count": [2, 2]}, r"llama\.block_count must be int, got \[2, 2\]"),
        (
            {"llama__attention__head_count": [4, 4]},
            r"llama\.attention\.head_count must be int, got \[4, 4\]",
        ),
    ],
)
def test_refused_gguf_metadata(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(**changes)
    assert str(error.value).startswith("x.gguf: ")
