# SPDX-License-Identifier: Apache-2.0
"""What each supported model family writes into its files, as data, and how it is read.

A key or a value that is not listed here is refused by name: a switch we do not know may change
the arithmetic, and a model that is nearly right is worse than none.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvq_jax.models.config import DecoderConfig

# Parameter of `Decoder` -> tensor in a Hugging Face checkpoint, tensor in a GGUF file.
# All families agree; a parameter that a config switches off is simply not looked up.
_NAMES = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "unembedding": ("lm_head.weight", "output.weight"),
    "norm.scale": ("model.norm.weight", "output_norm.weight"),
}
_LAYER_NAMES = {
    "attention_norm.scale": ("input_layernorm.weight", "attn_norm.weight"),
    "attention.q_proj.kernel": ("self_attn.q_proj.weight", "attn_q.weight"),
    "attention.q_proj.bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "attention.k_proj.kernel": ("self_attn.k_proj.weight", "attn_k.weight"),
    "attention.k_proj.bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "attention.v_proj.kernel": ("self_attn.v_proj.weight", "attn_v.weight"),
    "attention.v_proj.bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "attention.o_proj.kernel": ("self_attn.o_proj.weight", "attn_output.weight"),
    "attention.o_proj.bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "attention.q_norm.scale": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "mlp.gate_proj.kernel": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "mlp.gate_proj.bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "mlp.up_proj.kernel": ("mlp.up_proj.weight", "ffn_up.weight"),
    "mlp.up_proj.bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "mlp.down_proj.kernel": ("mlp.down_proj.weight", "ffn_down.weight"),
    "mlp.down_proj.bias": ("mlp.down_proj.bias", "ffn_down.bias"),
}
HUGGING_FACE_NAMES: dict[str, str] = {ours: name for ours, (name, _) in _NAMES.items()} | {
    f"layers.{{}}.{ours}": f"model.layers.{{}}.{name}" for ours, (name, _) in _LAYER_NAMES.items()
}
GGUF_NAMES: dict[str, str] = {ours: name for ours, (_, name) in _NAMES.items()} | {
    f"layers.{{}}.{ours}": f"blk.{{}}.{name}" for ours, (_, name) in _LAYER_NAMES.items()
}

# Hugging Face key -> field of DecoderConfig, for every family.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_q_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
}

# Known keys that do not change what the model computes.
_HARMLESS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "max_window_layers",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one Hugging Face architecture is configured.

    Attributes:
      model_type: the `model_type` its config.json must state.
      defaults: what a key of `_FIELDS`, "head_dim" or "sliding_window" means when it is left
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
_GGUF_FIELDS = {
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
_GGUF_CHECKED = {
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


def config_from_hugging_face(config: Mapping[str, Any], *, source: str) -> DecoderConfig:
    """Reads a Hugging Face config.json.

    Args:
      config: its content.
      source: name of the file, for error messages.

    Returns:
      The decoder's configuration.

    Raises:
      ValueError: an architecture, key or value that is not implemented, or a missing key.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"{source}: 'architectures' must name one architecture: {architectures!r}")
    architecture = str(architectures[0])
    if architecture not in FAMILIES:
        raise ValueError(
            f"{source}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    if config.get("model_type") != family.model_type:
        raise ValueError(
            f"{source}: model_type {config.get('model_type')!r} contradicts {architecture!r}, "
            f"which needs {family.model_type!r}"
        )
    known = {
        *_FIELDS,
        *family.defaults,
        *family.biases,
        *family.accepted,
        *family.harmless,
        *_HARMLESS,
        "tie_word_embeddings",
        "layer_types",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"{source}: unknown key(s) for {architecture}: {', '.join(unknown)}; "
            "they may change what the model computes, so it is not loaded"
        )
    for key, values in family.accepted.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{source}: {key}={config[key]!r} is not implemented; "
                f"supported: {', '.join(map(repr, values))}"
            )
    values = {**family.defaults, **config}
    if missing := sorted(set(_FIELDS) - set(values)):
        raise ValueError(f"{source}: missing key(s): {', '.join(missing)}")
    fields = {ours: values[key] for key, ours in _FIELDS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_q_heads"]
    fields["head_dim"] = values.get("head_dim")
    if fields["head_dim"] is None:
        fields["head_dim"] = _head_dim(fields, source)
    if "sliding_window" in family.defaults:
        fields["sliding_window"] = values["sliding_window"]
    for key, switches in family.biases.items():
        fields |= dict.fromkeys(switches, values.get(key, False))
    fields["tie_embeddings"] = values.get("tie_word_embeddings", False)
    try:
        decoder_config = _decoder_config(
            {**fields, **family.fixed, **_rope(config, fields["head_dim"])}
        )
        _check_layer_types(values.get("layer_types"), decoder_config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return decoder_config


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_divisors: tuple[float, ...] | None,
    *,
    source: str,
) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: its keys and values.
      shapes: of its tensors, by name, rows first.
      rope_divisors: content of the tensor `GGUF_ROPE_DIVISORS`, if there is one.
      source: name of the file, for error messages.

    Returns:
      The decoder's configuration.

    Raises:
      ValueError: an architecture, key or value that is not implemented, or a missing key.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"{source}: GGUF architecture {architecture!r} is not supported; "
            f"supported: {', '.join(GGUF_ARCHITECTURES)}"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{source}: holds a {kind!r}, not a model")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{source}: is one of {parts} parts; join them with llama.cpp's gguf-split --merge"
        )
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    if unknown := sorted(set(values) - set(_GGUF_FIELDS) - set(_GGUF_CHECKED)):
        raise ValueError(
            f"{source}: unknown key(s): {', '.join(prefix + key for key in unknown)}; "
            "they may change what the model computes, so it is not loaded"
        )
    values.setdefault("attention.head_count_kv", values.get("attention.head_count"))
    values.setdefault("rope.freq_base", 10000.0)  # as llama.cpp
    missing = [prefix + key for key in _GGUF_FIELDS if values.get(key) is None]
    missing += [name for name in ("token_embd.weight",) if name not in shapes]
    if missing:
        raise ValueError(f"{source}: missing: {', '.join(missing)}")
    fields = {ours: values[key] for key, ours in _GGUF_FIELDS.items()}
    fields["head_dim"] = values.get("attention.key_length")
    if fields["head_dim"] is None:
        fields["head_dim"] = _head_dim(fields, source)
    fields["vocab_size"] = shapes["token_embd.weight"][0]
    for key, ours in _GGUF_CHECKED.items():
        if (stated := values.get(key, fields[ours])) != fields[ours]:
            raise ValueError(
                f"{source}: {prefix}{key}={stated} is not implemented for {ours}={fields[ours]}"
            )
    fields["rope_divisors"] = rope_divisors
    # llama.cpp has no key for it: a tied model has no output tensor.
    fields["tie_embeddings"] = "output.weight" not in shapes
    try:
        return _decoder_config(fields | GGUF_ARCHITECTURES[architecture])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _decoder_config(values: dict[str, Any]) -> DecoderConfig:
    """Makes the config of values from a file, where any type may stand."""
    for field in dataclasses.fields(DecoderConfig):
        value = values.get(field.name)
        if field.type is float and type(value) is int:
            values[field.name] = float(value)
        elif field.type in (int, float, bool) and field.name in values:
            if type(value) is not field.type:
                raise ValueError(f"{field.name} must be {field.type.__name__}, got {value!r}")
        elif field.name == "sliding_window" and type(value) not in (int, type(None)):
            raise ValueError(f"{field.name} must be int or null, got {value!r}")
    return DecoderConfig(**values)


def _head_dim(fields: Mapping[str, Any], source: str) -> int:
    width, num_q_heads = fields["width"], fields["num_q_heads"]
    if type(width) is not int or type(num_q_heads) is not int or num_q_heads < 1:
        raise ValueError(f"{source}: bad width {width!r} or number of heads {num_q_heads!r}")
    if width % num_q_heads:
        raise ValueError(f"{source}: width {width} is not a multiple of {num_q_heads} heads")
    return width // num_q_heads


def _check_layer_types(layer_types: Any, config: DecoderConfig) -> None:
    expected = "full_attention" if config.sliding_window is None else "sliding_attention"
    if layer_types not in (None, [expected] * config.num_layers):
        raise ValueError(
            f"layer_types must be {expected!r} for each of the {config.num_layers} layers; "
            f"others are not implemented: {layer_types!r}"
        )


def _rope(config: Mapping[str, Any], head_dim: Any) -> dict[str, Any]:
    """Returns rope_theta and rope_divisors.

    transformers 5 writes one "rope_parameters"; before it, "rope_theta" and "rope_scaling".
    """
    if config.get("rope_parameters") and config.get("rope_scaling"):
        raise ValueError("both rope_parameters and rope_scaling are given; remove one")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters or rope_scaling is no object: {rope!r}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta is both {config['rope_theta']} and {theta}; remove one")
    older_type = rope.pop("type", "default")  # its name in older files
    rope_type = rope.pop("rope_type", older_type)
    keys = {
        "default": set(),
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
    }
    if str(rope_type) not in keys:
        raise ValueError(
            f"rope type {rope_type!r} is not implemented; supported: {', '.join(keys)}"
        )
    if set(rope) != keys[rope_type]:
        raise ValueError(
            f"rope type {rope_type!r} needs exactly the keys "
            f"{sorted(keys[rope_type])}, got {sorted(rope)}"
        )
    for key, value in {"rope_theta": theta, **rope}.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{key} must be a positive number, got {value!r}")
    if rope and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, got {rope}")
    if not rope or type(head_dim) is not int or head_dim < 1:  # DecoderConfig refuses those
        return {"rope_theta": theta}
    return {"rope_theta": theta, "rope_divisors": _llama3_divisors(theta, head_dim, **rope)}


def _llama3_divisors(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[float, ...]:
    """Slow rope pairs are slowed by `factor`, fast ones kept, those between interpolated."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_max_position_embeddings / wavelength
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return tuple((1 / ((1 - keep) / factor + keep)).tolist())
