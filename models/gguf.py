# SPDX-License-Identifier: Apache-2.0
"""Tensors and metadata of a GGUF file, dequantized one tensor at a time."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from kvq_jax.models.config import DecoderConfig
from kvq_jax.models.families import GGUF_NAMES, GGUF_ROPE_DIVISORS, config_from_gguf

_CHUNK_ELEMENTS = 1 << 20


class _BoundedReader(GGUFReader):
    """A reader that refuses to read past the end of the file.

    `GGUFReader` slices its memory map, which silently gives less; a file that claims 2**60
    strings would keep it busy for ever.
    """

    # Numbers come as Python's or NumPy's, hence no annotations.
    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"a field or tensor ends at byte {end}, the file at {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)


class GGUFCheckpoint:
    """One GGUF file.

    Attributes:
      source: the file, for error messages.
      metadata: its keys and values.
      shapes: of the tensors, by name, rows first.
      config: of the decoder.
      names: parameter of `Decoder` -> tensor.
    """

    names = GGUF_NAMES

    def __init__(self, path: Path):
        """Opens a file; tensors are mapped, not read.

        Args:
          path: the file.

        Raises:
          FileNotFoundError: it is not there.
          ValueError: it is damaged, or holds a model that is not supported.
        """
        self.source = str(path)
        try:
            reader = _BoundedReader(path)
            self.metadata: dict[str, Any] = {
                name: value.contents() for name, value in reader.fields.items()
            }
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: damaged or not GGUF ({error}); get it again") from error
        if reader.byte_order != "I" or sys.byteorder != "little":
            raise ValueError(f"{path}: only little-endian GGUF on little-endian machines is read")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {tensor.name: _shape(tensor) for tensor in reader.tensors}
        divisors = None
        if GGUF_ROPE_DIVISORS in self.shapes:
            divisors = tuple(self.read(GGUF_ROPE_DIVISORS).ravel().tolist())
            del self.shapes[GGUF_ROPE_DIVISORS]  # part of the config, not a parameter
        self.config: DecoderConfig = config_from_gguf(
            self.metadata, self.shapes, divisors, source=self.source
        )

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32, in the order Hugging Face stores it.

        Raises:
          ValueError: the tensor's quantization type is not supported.
        """
        tensor = self._tensors[name]
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        out = np.empty((rows.shape[0], int(tensor.shape[0])), np.float32)
        step = max(1, _CHUNK_ELEMENTS // out.shape[1])
        try:
            # In chunks of rows: dequantizing a whole embedding takes several times its size.
            for start in range(0, len(rows), step):
                out[start : start + step] = dequantize(
                    rows[start : start + step], tensor.tensor_type
                )
        except NotImplementedError as error:
            raise ValueError(
                f"{self.source}: tensor {name!r} is {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantize; requantize it with llama.cpp's llama-quantize"
            ) from error
        out = out.reshape(_shape(tensor))
        if self.metadata.get("general.architecture") == "llama":
            if name.endswith(".attn_q.weight"):
                out = _unpermute(out, self.config.num_q_heads)
            elif name.endswith(".attn_k.weight"):
                out = _unpermute(out, self.config.num_kv_heads)
        return out


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Returns the shape, rows first; GGUF writes the fastest axis first."""
    return tuple(tensor.shape.tolist()[::-1])


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of a query or key projection.

    Its rope for Llama turns neighbouring channels (2i, 2i + 1); ours, as Hugging Face's, turns
    (i, i + H/2). So in each head it stores `[2, H/2]` rows as `[H/2, 2]`.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
