# SPDX-License-Identifier: Apache-2.0
"""How the configuration of each supported model family is read from its files.

A key or a value that is not listed here is refused by name: a switch we do not know may change
the arithmetic, and a model that is nearly right is worse than none.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.config_keys import (
    FAMILIES,
    FIELDS,
    GGUF_ARCHITECTURES,
    GGUF_CHECKED,
    GGUF_FIELDS,
    HARMLESS,
    LARGEST,
    SWITCHED_OFF,
)
from kvq_jax.models.json_files import short, token_ids

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

_WHY_REFUSED = (
    "they may change what the model computes, so it is not loaded; "
    "if you know that they do not, pass them as ignore_keys"
)
HUGGING_FACE_KEYS: dict[str, str] = {ours: key for key, ours in FIELDS.items()} | {
    "head_dim": "head_dim"
}


def gguf_keys(architecture: str) -> dict[str, str]:
    """Returns field of `DecoderConfig` -> key of the metadata of a GGUF file."""
    keys = {ours: f"{architecture}.{key}" for key, ours in GGUF_FIELDS.items()}
    return keys | {
        "head_dim": f"{architecture}.attention.key_length",
        "vocab_size": f"{architecture}.vocab_size",
    }


def config_from_hugging_face(
    config: Mapping[str, Any], *, source: str, ignore_keys: Collection[str] = ()
) -> DecoderConfig:
    """Reads a Hugging Face config.json.

    Args:
      config: its content.
      source: name of the file, for error messages.
      ignore_keys: unknown keys to accept.

    Returns:
      The decoder's configuration.

    Raises:
      ValueError: an architecture, key or value that is not implemented, or a missing key.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(
            f"{source}: 'architectures' must name one architecture: {short(architectures)}"
        )
    architecture = architectures[0]
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(
            f"{source}: architecture {short(architecture)} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    if config.get("model_type") != family.model_type:
        raise ValueError(
            f"{source}: model_type {short(config.get('model_type'))} contradicts {architecture!r}, "
            f"which needs {family.model_type!r}"
        )
    known = {
        *ignore_keys,
        *FIELDS,
        *family.defaults,
        *family.biases,
        *family.accepted,
        *family.harmless,
        *HARMLESS,
        "tie_word_embeddings",
        "layer_types",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
    if unknown := sorted(key for key in set(config) - known if not _is_off(key, config[key])):
        raise ValueError(
            f"{source}: unknown key(s) for {architecture}: {_listed(unknown)}; {_WHY_REFUSED}"
        )
    token_ids(config, "eos_token_id", source=source)
    for key, values in family.accepted.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{source}: {key}={short(config[key])} is not implemented; "
                f"supported: {', '.join(map(repr, values))}"
            )
    values = {**family.defaults, **config}
    if missing := sorted(set(FIELDS) - set(values)):
        raise ValueError(f"{source}: missing key(s): {', '.join(missing)}")
    fields = {ours: values[key] for key, ours in FIELDS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_q_heads"]
    if "sliding_window" in family.defaults:
        fields["sliding_window"] = values["sliding_window"]
    for key, switches in family.biases.items():
        fields |= dict.fromkeys(switches, values.get(key, False))
    fields["tie_embeddings"] = values.get("tie_word_embeddings", False)
    try:
        fields["head_dim"] = _head_dim(fields, values.get("head_dim"), HUGGING_FACE_KEYS)
        fields |= family.fixed
        fields |= _rope(config, fields["head_dim"])
        decoder_config = _decoder_config(fields, HUGGING_FACE_KEYS)
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
    ignore_keys: Collection[str] = (),
) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: its keys and values.
      shapes: of its tensors, by name, rows first.
      rope_divisors: content of the tensor `GGUF_ROPE_DIVISORS`, if there is one.
      source: name of the file, for error messages.
      ignore_keys: unknown keys to accept.

    Returns:
      The decoder's configuration.

    Raises:
      ValueError: an architecture, key or value that is not implemented, or a missing key.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"{source}: GGUF architecture {short(architecture)} is not supported; "
            f"supported: {', '.join(GGUF_ARCHITECTURES)}"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{source}: holds a {short(kind)}, not a model")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{source}: is one of {short(parts)} parts; join them with "
            "llama.cpp's gguf-split --merge"
        )
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    unknown = {prefix + key for key in set(values) - set(GGUF_FIELDS) - set(GGUF_CHECKED)}
    if unknown := sorted(unknown - set(ignore_keys)):
        raise ValueError(f"{source}: unknown key(s): {_listed(unknown)}; {_WHY_REFUSED}")
    values.setdefault("attention.head_count_kv", values.get("attention.head_count"))
    values.setdefault("rope.freq_base", 10000.0)  # as llama.cpp
    missing = [prefix + key for key in GGUF_FIELDS if values.get(key) is None]
    missing += [name for name in ("token_embd.weight",) if name not in shapes]
    if missing:
        raise ValueError(f"{source}: missing: {', '.join(missing)}")
    fields = {ours: values[key] for key, ours in GGUF_FIELDS.items()}
    fields["vocab_size"] = shapes["token_embd.weight"][0]
    keys = gguf_keys(architecture)
    try:
        fields["head_dim"] = _head_dim(fields, values.get("attention.key_length"), keys)
        for key, ours in GGUF_CHECKED.items():
            if (stated := values.get(key, fields[ours])) != fields[ours]:
                raise ValueError(
                    f"{prefix}{key}={short(stated)} is not implemented for {ours}={fields[ours]}"
                )
        fields["rope_divisors"] = rope_divisors
        # llama.cpp has no key for it: a tied model has no output tensor.
        fields["tie_embeddings"] = "output.weight" not in shapes
        return _decoder_config(fields | GGUF_ARCHITECTURES[architecture], keys)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _is_off(key: str, value: Any) -> bool:
    """Whether a key's value is the one that changes nothing."""
    if value is None:
        return True
    # False == 0, but a number where a switch belongs is a mistake.
    off = SWITCHED_OFF.get(key)
    return off is not None and value == off and isinstance(value, bool) == isinstance(off, bool)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(short(name)[1:-1] for name in names[:8]) + more


def _decoder_config(values: dict[str, Any], keys: Mapping[str, str]) -> DecoderConfig:
    """Makes the config of values from a file, where any type may stand."""
    for field in dataclasses.fields(DecoderConfig):
        key, value = keys.get(field.name, field.name), values.get(field.name)
        if field.type is float and type(value) is int:
            values[field.name] = float(value)
        elif field.name in LARGEST:
            _check_size(field.name, value, key)
        elif field.type in (float, bool) and field.name in values:
            if type(value) is not field.type:
                raise ValueError(f"{key} must be {field.type.__name__}, got {short(value)}")
        elif field.name == "sliding_window" and value is not None:
            _check_size("max_length", value, key, " or null")
    return DecoderConfig(**values)


def _check_size(field: str, value: Any, key: str, other: str = "") -> None:
    if type(value) is not int:
        raise ValueError(f"{key} must be int{other}, got {short(value)}")
    if value < 1:
        raise ValueError(f"{key} must be a positive integer{other}, got {short(value)}")
    if value > LARGEST[field]:
        raise ValueError(f"{key} must be at most {LARGEST[field]}, got {short(value)}")


def _head_dim(fields: Mapping[str, Any], stated: Any, keys: Mapping[str, str]) -> int:
    """Returns the stated head_dim, or the width over the number of heads."""
    if stated is not None:
        _check_size("head_dim", stated, keys["head_dim"])
        return stated
    for field in ("width", "num_q_heads"):
        _check_size(field, fields[field], keys[field])
    width, num_q_heads = fields["width"], fields["num_q_heads"]
    if width % num_q_heads:
        raise ValueError(
            f"{keys['width']}={width} is not a multiple of {keys['num_q_heads']}={num_q_heads}"
        )
    return width // num_q_heads


def _check_layer_types(layer_types: Any, config: DecoderConfig) -> None:
    expected = "full_attention" if config.sliding_window is None else "sliding_attention"
    if layer_types not in (None, [expected] * config.num_layers):
        raise ValueError(
            f"layer_types must be {expected!r} for each of the {config.num_layers} layers; "
            f"others are not implemented: {short(layer_types)}"
        )


def _rope(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Returns rope_theta and rope_divisors.

    transformers 5 writes one "rope_parameters"; before it, "rope_theta" and "rope_scaling".
    """
    if config.get("rope_parameters") and config.get("rope_scaling"):
        raise ValueError("both rope_parameters and rope_scaling are given; remove one")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters or rope_scaling is no object: {short(rope)}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("rope_theta", theta) != theta:
        raise ValueError(
            f"rope_theta is both {short(config['rope_theta'])} and {short(theta)}; remove one"
        )
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
    if not isinstance(rope_type, str) or rope_type not in keys:
        raise ValueError(
            f"rope type {short(rope_type)} is not implemented; supported: {', '.join(keys)}"
        )
    if set(rope) != keys[rope_type]:
        raise ValueError(
            f"rope type {rope_type!r} needs exactly the keys "
            f"{sorted(keys[rope_type])}, got {short(sorted(rope))}"
        )
    for key, value in {"rope_theta": theta, **rope}.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{key} must be a positive number, got {short(value)}")
    if rope and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, got {rope}")
    if not rope:
        return {"rope_theta": theta}
    # NumPy computes with an integer above 2**63 as with an object.
    rope = {key: float(value) for key, value in rope.items()}
    return {"rope_theta": theta, "rope_divisors": _llama3_divisors(float(theta), head_dim, **rope)}


def _llama3_divisors(
    theta: float,
    head_dim: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[float, ...]:
    """Slow rope pairs are slowed by `factor`, fast ones kept, those between interpolated."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = original_max_position_embeddings / wavelength
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return tuple((1 / ((1 - keep) / factor + keep)).tolist())
