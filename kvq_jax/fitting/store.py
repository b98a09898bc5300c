# SPDX-License-Identifier: Apache-2.0
"""Saving and loading calibrations.

A calibration is a folder:

    description.json  format, method, model, sizes and texts; the arrays' shapes and dtypes; the
                      sha256 of each file in arrays/
    arrays/           the arrays by their names, written by orbax

It is written beside its place and renamed when it is whole. Before `load_calibration` reads any
array, the description must be what the method and the model ask for, and the files must have the
digests that are in it, and no more bytes than such arrays can take: orbax itself reads whatever
sizes a folder claims, and its background tasks outlive an error.
"""

import hashlib
import json
import math
import os
import reprlib
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kvq_jax.base import CacheTransform, Params, nbytes
from kvq_jax.fitting import contract
from kvq_jax.models import DecoderConfig

FORMAT = 1
"""Version of what is written; raise it when an older reader would misunderstand."""

_DESCRIPTION = "description.json"
_ARRAYS = "arrays"
_LONGEST = 16 << 20
"""Bytes of the longest description that is read: that of a hundred thousand arrays."""

_METADATA = {"method": dict, "model": dict, "sizes": object, "texts": dict}
_FIELDS = {"format": int} | _METADATA | {"arrays": dict, "files": dict}
_TEXTS = {"windows": int, "context": int, "tokens": int, "sha256": str}
_ARRAY = {"shape": list, "dtype": str}


class Calibration(NamedTuple):
    """What `calibrate` returns.

    Attributes:
      method: the method to use. It is the one that was given, unless calibration decides more of
        it than parameters: such as how many bits each layer gets.
      params: each layer's parameters, for `CacheTransform.with_params`.
      metadata: what was fitted and to what: method, sizes of the model, digest of the texts.
    """

    method: CacheTransform
    params: tuple[Params, ...]
    metadata: dict[str, Any]


def check_new(path: str | Path) -> None:
    """Raises an `OSError` unless a folder can be written at the path, and makes its parents.

    Raises:
      FileExistsError: for a path that exists.
      OSError: for a parent that can't be made or written.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise _exists(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def save_calibration(path: str | Path, calibration: Calibration) -> None:
    """Writes a calibration into a new folder, whole or not at all.

    Args:
      path: the folder to make; its parents are made too.
      calibration: what `calibrate` returned.

    Raises:
      FileExistsError: for a path that exists, also if another process was first to make it.
      OSError: for a path that can't be written.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    check_new(path)
    arrays = {name: np.asarray(x) for name, x in _named(calibration.params).items()}
    declared = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in arrays.items()}
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()  # by the caller's umask; `scratch` itself is for its owner alone
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(folder / _ARRAYS, args=ocp.args.StandardSave(arrays))
        except ValueError as error:  # also for a full disk
            raise OSError(f"{path} could not be written: {str(error)[:500]}") from error
        description = {"format": FORMAT} | calibration.metadata
        description |= {"arrays": declared, "files": _digests(folder / _ARRAYS)}
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1, allow_nan=False))
        try:
            folder.rename(path)
        except OSError as error:
            if os.path.lexists(path):
                raise _exists(path) from error
            raise


def load_calibration(
    path: str | Path, method: CacheTransform, config: DecoderConfig
) -> Calibration:
    """Reads a calibration.

    Args:
      path: the folder.
      method: the method to use it with. Only what is fitted must be as it was: windows may
        differ. What calibration decided is in the `method` of the result.
      config: the model's sizes.

    Raises:
      FileNotFoundError: for a path that does not exist.
      ValueError: for a folder that holds no whole calibration, or one of another method or model;
        and for a method that needs no calibration.
    """
    window = contract.fitted_window(method)
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: kvq calibrate makes such a folder")
    file = path / _DESCRIPTION
    description = _read_description(file)
    for key, wanted in contract.describe(window, config).items():
        _check_same(path, f"the {key}", description[key], wanted)
    try:
        window = contract.with_sizes(window, description["sizes"])
        empty = contract.empty_params(window, config)
    except ValueError as error:
        raise ValueError(f"{file}: wrong sizes: {error}") from error
    wanted = _named(empty)
    declared = description["arrays"]
    _check_keys(file, "arrays", declared, dict.fromkeys(wanted, dict))
    for name, shape in wanted.items():
        _check_keys(file, f"arrays.{name}", declared[name], _ARRAY)
        for key, right in (("shape", list(shape.shape)), ("dtype", str(shape.dtype))):
            if declared[name][key] != right:
                got = reprlib.repr(declared[name][key])
                raise ValueError(f"{file}: arrays.{name}.{key} must be {right}, got {got}")
    _check_files(path / _ARRAYS, description["files"], wanted)
    arrays = _read_arrays(path / _ARRAYS, wanted)
    params = jax.tree.unflatten(jax.tree.structure(empty), [arrays[name] for name in wanted])
    metadata = {key: description[key] for key in _METADATA}
    return Calibration(contract.with_window(method, window), params, metadata)


def _read_description(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"{file.parent} is not a calibration that this version of kvq reads: "
            f"there is no {_DESCRIPTION} in it"
        )
    with file.open("rb") as stream:
        data = stream.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ValueError(f"{file} is longer than the {_LONGEST} bytes of any calibration")
    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(description, dict) or type(description.get("format")) is not int:
        raise ValueError(f"{file}: not the description of a calibration, which has a format")
    if description["format"] != FORMAT:
        raise ValueError(
            f"{file} is of format {reprlib.repr(description['format'])}, and this version of kvq "
            f"reads format {FORMAT}: calibrate again"
        )
    _check_keys(
        file, "", description, {"format": int} | _METADATA | {"arrays": dict, "files": dict}
    )
    _check_keys(file, "texts", description["texts"], _TEXTS)
    return description


def _check_keys(file: Path, where: str, found: dict, types: Mapping[str, type]) -> None:
    """Refuses missing and unknown keys, and values of other types."""
    prefix = f"{where}." if where else ""
    for key, kind in types.items():
        if key not in found:
            raise ValueError(f"{file}: the key {prefix}{key} is missing")
        if not isinstance(found[key], kind) or (kind is int and isinstance(found[key], bool)):
            got = reprlib.repr(found[key])
            raise ValueError(f"{file}: {prefix}{key} must be of type {kind.__name__}, got {got}")
    for key in found:
        if key not in types:
            raise ValueError(f"{file}: unknown key {prefix}{reprlib.repr(key)}")


def _check_same(path: Path, where: str, found: Any, wanted: Any) -> None:
    """Refuses a calibration of another method or model, naming what differs."""
    if not isinstance(wanted, dict) or not isinstance(found, dict):
        if found != wanted:
            raise ValueError(
                f"{path} was fitted for {where} {reprlib.repr(found)}, not {reprlib.repr(wanted)}"
            )
        return
    for key, value in wanted.items():
        if key not in found:
            raise ValueError(f"{path} was fitted for {where} without {key!r}")
        _check_same(path, f"{where}.{key}", found[key], value)
    for key in found:
        if key not in wanted:
            raise ValueError(f"{path} was fitted for {where} with unknown {reprlib.repr(key)}")


def _read_arrays(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Reads arrays of the given shapes, once it is clear that no others would be read."""
    import orbax.checkpoint as ocp

    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            found = checkpointer.metadata(folder).item_metadata.tree
            if found.keys() != wanted.keys():
                raise ValueError(f"it has the arrays {reprlib.repr(list(found))}")
            for name, x in wanted.items():
                shape, dtype = tuple(found[name].shape), np.dtype(found[name].dtype)
                if (shape, dtype) != (x.shape, x.dtype):
                    raise ValueError(f"{name} is {dtype} {shape}, not {x.dtype} {x.shape}")
                # A chunk is unpacked whole, however little of it belongs to its array.
                if math.prod(found[name].storage.chunk_shape) > math.prod(shape):
                    raise ValueError(f"a chunk of {name} is larger than the array")
            arrays = checkpointer.restore(folder, args=ocp.args.StandardRestore(wanted))
    except Exception as error:  # whatever orbax and the libraries below it raise
        message = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"{folder} is damaged: {message}") from error
    return {name: np.asarray(x) for name, x in arrays.items()}


def _check_files(
    folder: Path, digests: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Refuses files that are not those that were saved."""
    if not folder.is_dir():
        raise ValueError(f"{folder.parent} is damaged: there is no folder {folder.name} in it")
    # The arrays as they are, and what orbax adds for the folder and for each of them.
    found = _digests(folder, 2 * nbytes(wanted) + (1 << 20) + (len(wanted) << 12))
    for name, digest in found.items():
        if name not in digests:
            raise ValueError(f"{folder / name} was not saved with the calibration")
        if digest != digests[name]:
            raise ValueError(f"{folder / name} has changed since it was saved")
    for name in digests:
        if name not in found:
            raise ValueError(f"{folder} is damaged: {reprlib.repr(name)} is missing")


def _digests(folder: Path, most: float | int = math.inf) -> dict[str, str]:
    """Returns the sha256 of each file in a folder, which must have at most so many bytes."""
    files = {}
    for file in folder.rglob("*"):
        status = file.lstat()
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file} is neither a file nor a folder")
        most -= status.st_size
        if most < 0:
            raise ValueError(f"{folder} has more bytes than the arrays of this method can take")
        with file.open("rb") as stream:
            files[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256")
    return {name: digest.hexdigest() for name, digest in files.items()}


def _named(params: tuple[Params, ...]) -> dict[str, Any]:
    """Returns the arrays of all layers by names such as `layer.part.array`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already: choose another folder, or remove it")
