# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: its metadata, and where each tensor is.

The gguf package's own reader makes a NumPy view of every array element (1 MB of array takes a
minute and .7 GB) and lets tensors overlap. This one reads arrays whole, within limits, and
accepts one layout only: the tensors in the order of the header, without gap or overlap, up to
the end of the file. llama.cpp requires the same of their offsets.

Reference:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from typing import Any, NamedTuple

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import quant_shape_to_byte_shape

from kvq_jax.models.json_files import short

_VERSIONS = (2, GGUF_VERSION)
# Four times what the largest vocabularies take (262,144 tokens with merges, scores and types).
_MOST_BYTES = 1 << 26
_MOST_ITEMS = 1 << 22
_MOST_AXES = 4  # as in llama.cpp

# Type of a value -> its format in `struct`.
_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


class TensorInfo(NamedTuple):
    """One tensor of a GGUF file.

    Attributes:
      type: how its numbers are stored.
      shape: in numbers, rows first; GGUF writes the fastest axis first.
      byte_shape: the same with its last axis in bytes.
      start: its first byte in the file.
    """

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    byte_shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.start + math.prod(self.byte_shape)


def read_header(data: memoryview) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Reads the header of a GGUF file.

    Args:
      data: all bytes of the file.

    Returns:
      The metadata by key, and the tensors by name.

    Raises:
      ValueError: the file is damaged, or its header beyond this reader's limits.
    """
    reader = _Reader(data)
    if reader.number("I") != GGUF_MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("it is big-endian; only little-endian files are read")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; supported: {', '.join(map(str, _VERSIONS))}")
    num_tensors, num_keys = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"key {short(key)} occurs twice")
        try:
            metadata[key] = reader.value()
        except ValueError as error:
            raise ValueError(f"key {short(key)}: {error}") from error
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two: {short(alignment)}")
    # Offsets count from the end of the header, which is known only when it is read.
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name = reader.string()
        if name in tensors:
            raise ValueError(f"tensor {short(name)} occurs twice")
        try:
            tensors[name] = reader.tensor()
        except ValueError as error:
            raise ValueError(f"tensor {short(name)}: {error}") from error
    first = _aligned(reader.position, alignment)
    tensors = {name: info._replace(start=first + info.start) for name, info in tensors.items()}
    _check_layout(tensors, first, alignment, len(data))
    return metadata, tensors


def _check_layout(
    tensors: dict[str, TensorInfo], first: int, alignment: int, num_bytes: int
) -> None:
    """Checks that the tensors fill the file from byte `first` on.

    A damaged offset would silently load other weights. So would a wrong alignment, which moves
    all tensors and shows only at the end of the file.
    """
    end = due = first
    for name, info in tensors.items():
        if info.start != due:
            raise ValueError(
                f"tensor {short(name)} begins at byte {info.start}, the one before it ends at "
                f"{end}: it must begin at {due}, without gap or overlap"
            )
        end, due = info.end, _aligned(info.end, alignment)
        if end > num_bytes:
            raise ValueError(f"tensor {short(name)} ends at byte {end}, the file at {num_bytes}")
    if tensors and num_bytes > due:
        raise ValueError(f"the last tensor ends at byte {end}, the file at {num_bytes}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Reader:
    """Reads one field after the other, never beyond the end."""

    def __init__(self, data: memoryview):
        self._data = data
        self.position = 0
        self._num_items = 0

    def _advance(self, num_bytes: int) -> int:
        """Returns where the next field of this size begins, and moves on to its end."""
        start, end = self.position, self.position + num_bytes
        if end > len(self._data):
            raise ValueError(f"a field ends at byte {end}, the file at {len(self._data)}")
        if end > _MOST_BYTES:
            raise ValueError(f"the header is larger than {_MOST_BYTES >> 20} MiB")
        self.position = end
        return start

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{count}{form}", self._data, self._advance(count * size))

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def string(self) -> str:
        size = self.number("Q")
        start = self._advance(size)
        return str(self._data[start : start + size], "utf-8")

    def strings(self, count: int) -> list[str]:
        # One loop without calls: a vocabulary has half a million tokens and merges.
        data, position, end = self._data, self.position, min(len(self._data), _MOST_BYTES)
        read_size = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = position + 8
            position = start + read_size(data, position)[0] if start <= end else start
            if position > end:
                break
            found.append(str(data[start:position], "utf-8"))
        self._advance(position - self.position)  # refuses what ends beyond the file
        return found

    def value(self) -> Any:
        kind = GGUFValueType(self.number("I"))
        if kind != GGUFValueType.ARRAY:
            return self.string() if kind == GGUFValueType.STRING else self.number(_FORMATS[kind])
        kind, count = GGUFValueType(self.number("I")), self.number("Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays is not supported")
        # A list takes many times the bytes of an array in the file.
        self._num_items += count
        if self._num_items > _MOST_ITEMS:
            raise ValueError(
                f"an array of {count} items; the arrays of a file may have {_MOST_ITEMS} in all"
            )
        if kind == GGUFValueType.STRING:
            return self.strings(count)
        return list(self.numbers(_FORMATS[kind], count))

    def tensor(self) -> TensorInfo:
        num_axes = self.number("I")
        if not 1 <= num_axes <= _MOST_AXES:
            raise ValueError(f"{num_axes} axes; supported: 1 to {_MOST_AXES}")
        shape = self.numbers("Q", num_axes)[::-1]
        if 0 in shape:
            raise ValueError(f"it is empty, {list(shape)}")
        kind = GGMLQuantizationType(self.number("I"))
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"the size of type {kind.name} is not known")
        return TensorInfo(kind, shape, quant_shape_to_byte_shape(shape, kind), self.number("Q"))
