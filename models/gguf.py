# SPDX-License-Identifier: Apache-2.0
"""Tensors and metadata of a GGUF file, dequantized one tensor at a time."""

import math
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf.quants import dequantize

from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.config_keys import GGUF_ROPE_DIVISORS, LARGEST
from kvq_jax.models.families import (
    GGUF_NAMES,
    config_from_gguf,
    gguf_keys,
)
from kvq_jax.models.gguf_header import read_header
from kvq_jax.models.json_files import check_regular

_CHUNK_ELEMENTS = 1 << 20


class GGUFCheckpoint:
    """One GGUF file.

    Attributes:
      source: the file, for error messages.
      metadata: its keys and values.
      shapes: of the tensors, by name, rows first.
      config: of the decoder.
      names: parameter of `Decoder` -> tensor.
      keys: field of `DecoderConfig` -> key of the metadata.
    """

    names = GGUF_NAMES

    def __init__(self, path: Path, *, ignore_keys: Collection[str] = ()):
        """Opens a file; tensors are mapped, not read.

        Args:
          path: the file.
          ignore_keys: unknown keys of the metadata to accept.

        Raises:
          FileNotFoundError: it is not there.
          ValueError: it is damaged, or holds a model that is not supported.
        """
        self.source = str(path)
        if sys.byteorder != "little":
            raise ValueError(f"{path}: GGUF is read on little-endian machines only")
        check_regular(path)
        try:
            self._data = np.memmap(path, np.uint8, mode="r")
            self.metadata, self._tensors = read_header(memoryview(self._data))
        except ValueError as error:
            raise ValueError(f"{path}: damaged or not GGUF ({error}); get it again") from error
        self.shapes = {name: info.shape for name, info in self._tensors.items()}
        divisors = None
        if (shape := self.shapes.pop(GGUF_ROPE_DIVISORS, None)) is not None:
            # Part of the config, not a parameter.
            if math.prod(shape) > LARGEST["head_dim"] // 2:
                raise ValueError(f"{path}: {GGUF_ROPE_DIVISORS!r} is too large: {list(shape)}")
            divisors = tuple(self.read(GGUF_ROPE_DIVISORS).ravel().tolist())
        self.config: DecoderConfig = config_from_gguf(
            self.metadata, self.shapes, divisors, source=self.source, ignore_keys=ignore_keys
        )
        self.keys = gguf_keys(self.metadata["general.architecture"])

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32, in the order Hugging Face stores it.

        Raises:
          ValueError: the tensor's quantization type is not supported.
        """
        info = self._tensors[name]
        rows = self._data[info.start : info.end].reshape(-1, info.byte_shape[-1])
        out = np.empty((rows.shape[0], info.shape[-1]), np.float32)
        step = max(1, _CHUNK_ELEMENTS // out.shape[1])
        try:
            # In chunks of rows: dequantizing a whole embedding takes several times its size.
            for start in range(0, len(rows), step):
                out[start : start + step] = dequantize(rows[start : start + step], info.type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.source}: tensor {name!r} is {info.type.name}, which the gguf "
                "package cannot dequantize; requantize it with llama.cpp's llama-quantize"
            ) from error
        out = out.reshape(info.shape)
        if self.metadata.get("general.architecture") == "llama":
            if name.endswith(".attn_q.weight"):
                out = _unpermute(out, self.config.num_q_heads)
            elif name.endswith(".attn_k.weight"):
                out = _unpermute(out, self.config.num_kv_heads)
        return out


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of a query or key projection.

    Its rope for Llama turns neighbouring channels (2i, 2i + 1); ours, as Hugging Face's, turns
    (i, i + H/2). So in each head it stores `[2, H/2]` rows as `[H/2, 2]`.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
