# SPDX-License-Identifier: Apache-2.0
"""Tensors of a Hugging Face folder, read one at a time."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from kvq_jax.models.families import HUGGING_FACE_KEYS, HUGGING_FACE_NAMES
from kvq_jax.models.json_files import check_regular, read_json, short

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MOST_CHARACTERS = 200  # of a file's name; file systems allow 255 bytes
_DTYPES = ("F32", "F16", "BF16")


class SafetensorsCheckpoint:
    """The tensors of `model.safetensors`, or of the shards its index lists.

    Attributes:
      source: the folder, for error messages.
      shapes: of the tensors, by name.
      names: parameter of `Decoder` -> tensor.
      keys: field of `DecoderConfig` -> key of config.json.
    """

    names = HUGGING_FACE_NAMES
    keys = HUGGING_FACE_KEYS

    def __init__(self, folder: Path):
        """Opens a folder; tensors are mapped, not read.

        Args:
          folder: holds `model.safetensors` or `model.safetensors.index.json`.

        Raises:
          FileNotFoundError: a file is not there.
          ValueError: a file is damaged, or does not hold what the index says.
        """
        self.source = str(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files = {}
        if (folder / _SINGLE).exists():
            self._add(folder / _SINGLE)
        elif (folder / _INDEX).exists():
            weight_map = _read_index(folder / _INDEX)
            for name in sorted(set(weight_map.values())):
                self._add(folder / name)
            held = {name: Path(path).name for name, (path, _) in self._files.items()}
            if wrong := sorted(set(held.items()) ^ set(weight_map.items())):
                name, shard = wrong[0]
                raise ValueError(
                    f"{folder / _INDEX}: tensor {name!r} is not where the index says, or not in "
                    f"it ({shard}); download the checkpoint again"
                )
        else:
            raise FileNotFoundError(
                f"{folder}: has neither {_SINGLE} nor {_INDEX}; only safetensors are read"
            )

    def _add(self, path: Path) -> None:
        try:
            check_regular(path)
            # Metadata and bounds of every tensor are checked by the library here.
            file = safe_open(path, framework="numpy")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: listed in {_INDEX} but not there") from error
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); download it again") from error
        for name in sorted(file.keys()):
            if name in self.shapes:
                raise ValueError(f"{path}: tensor {name!r} is in another shard too")
            view = file.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: tensor {name!r} is {view.get_dtype()}; supported: "
                    f"{', '.join(_DTYPES)} (quantized checkpoints are not)"
                )
            self.shapes[name] = tuple(view.get_shape())
            self._files[name] = (path, file)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in the dtype of the file."""
        return self._files[name][1].get_tensor(name)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: not an index of safetensors (weight_map: {short(weight_map)})")
    for name, file in weight_map.items():
        # A shard is a file beside the index, never a path that leads out of the folder.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or Path(file).suffix == ""
            or len(file) > _MOST_CHARACTERS
        ):
            raise ValueError(f"{path}: {short(file)} is not a file name (tensor {short(name)})")
    return weight_map
