# SPDX-License-Identifier: Apache-2.0
"""The keys that model files are known to hold, as data: what each means, and for which family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Hugging Face key -> field of DecoderConfig, for every family.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
}

# Field of `DecoderConfig` -> the largest size that is read. Real models are far smaller; larger
# values would allocate gigabytes before any tensor is checked.
LARGEST = {
    "vocab_size": 1 << 24,
    "width": 1 << 24,
    "num_layers": 10_000,
    "num_q_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "mlp_width": 1 << 24,
    "max_length": (1 << 31) - 1,
}

# Known keys that do not change what the model computes.
HARMLESS = frozenset(
    {
        # How the file came about.
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "is_llama_config",
        "model_type",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # Training.
        "attention_dropout",
        "dropout",
        "gradient_checkpointing",
        "hidden_dropout",
        "initializer_range",
        "neftune_noise_alpha",
        "problem_type",
        "resid_pdrop",
        # Dtypes and implementations, which the caller chooses here.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "dtype",
        "torch_dtype",
        "torchscript",
        "use_cache",
        "use_flash_attention_2",
        # What a call returns.
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "task_specific_params",
        # Tokens and texts.
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tokenizer_class",
        "unk_token_id",
        # Which layers would use a sliding window, if `use_sliding_window` were on.
        "max_window_layers",
    }
)
# Switches that other models or versions have, and the value that leaves them off. Any other
# value may change what the model computes. null is off for every key.
SWITCHED_OFF: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bfloat16": False,
    "use_mrope": False,
    "use_sliding_window": False,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one Hugging Face architecture is configured.

    Attributes:
      model_type: the `model_type` its config.json must state.
      defaults: what a key of `FIELDS`, "head_dim" or "sliding_window" means when it is left
        out, as in transformers; keys that are neither here nor in the file are refused.
      biases: key -> fields of `DecoderConfig` it switches; False when left out.
      fixed: fields of `DecoderConfig` the architecture fixes.
      accepted: key -> values implemented here, for keys that select a code path. The first one
        is what transformers takes when the key is left out.
      harmless: further keys that do not change what the model computes.
    """

    model_type: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()


_ACCEPTED = {"hidden_act": ("silu",)}
# Qwen writes a window even where `use_sliding_window` says that no layer uses it.
_QWEN_ACCEPTED = _ACCEPTED | {"use_sliding_window": (False,)}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults={"num_key_value_heads": None, "head_dim": None},
        biases={"attention_bias": ("qkv_bias", "o_bias"), "mlp_bias": ("mlp_bias",)},
        accepted=_ACCEPTED | {"pretraining_tp": (1,), "rope_interleaved": (False,)},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults={"head_dim": None, "sliding_window": 4096},
        accepted=_ACCEPTED,
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        defaults={"head_dim": None},
        fixed={"qkv_bias": True},
        accepted=_QWEN_ACCEPTED,
        harmless=frozenset({"sliding_window"}),
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        defaults={"head_dim": 128},
        biases={"attention_bias": ("qkv_bias", "o_bias")},
        fixed={"qk_norm": True},
        accepted=_QWEN_ACCEPTED,
        harmless=frozenset({"sliding_window"}),
    ),
}

# GGUF key, less the prefix "ARCHITECTURE." -> field of DecoderConfig.
GGUF_FIELDS = {
    "block_count": "num_layers",
    "context_length": "max_length",
    "embedding_length": "width",
    "feed_forward_length": "mlp_width",
    "attention.head_count": "num_q_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
# Keys that say again what other keys or the tensors' shapes say; checked to agree.
GGUF_CHECKED = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
GGUF_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},  # Llama and Mistral
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
GGUF_ROPE_DIVISORS = "rope_freqs.weight"
