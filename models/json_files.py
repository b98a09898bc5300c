# SPDX-License-Identifier: Apache-2.0
"""Reads the JSON files that come with a model, which may be damaged or hostile."""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The index of a checkpoint with 100,000 tensors is 12 MB.
_MOST_BYTES = 1 << 24
# Real files nest five deep. Comparing or printing a value recurses once per level.
_MOST_LEVELS = 64
# Digits of the largest float; a longer integer overflows wherever it is computed with.
_MOST_DIGITS = 308

short = reprlib.Repr(maxlevel=3, maxlist=8, maxdict=8, maxstring=80, maxlong=40, maxother=80).repr
"""Returns the `repr` of any value, cut to a length that fits an error message."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: the file.

    Returns:
      Its content: no number is NaN or infinite, or too large for a float.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a regular file, too large, not JSON, or not an object.
    """
    check_regular(path)
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"{path}: larger than {_MOST_BYTES >> 20} MiB; no such file should be")
    try:
        content = json.loads(raw.decode(), parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object, but {short(content)}")
    for key, value in content.items():
        try:
            _check_value(value)
        except ValueError as error:
            raise ValueError(f"{path}: {key[:80]} {error}") from error
    return content


def check_regular(path: Path) -> None:
    """Checks that a path can be read without blocking: opening a FIFO waits for its writer.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a folder, a FIFO or a device.
    """
    if path.is_file():
        return
    if path.exists():
        raise ValueError(f"{path}: not a regular file")
    raise FileNotFoundError(f"{path}: not there")


def token_ids(settings: Mapping[str, Any], key: str, *, source: str) -> list[int]:
    """Reads a setting that holds no token id, one, or a list of them.

    Args:
      settings: content of a JSON file.
      key: the setting, such as "eos_token_id".
      source: name of the file, for error messages.

    Raises:
      ValueError: it holds anything else.
    """
    value = settings.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise ValueError(f"{source}: {key} must be an integer or a list of them: {short(value)}")
    return ids


def _parse_int(digits: str) -> int | float:
    # Infinity is refused with its key once the file is parsed.
    return int(digits) if len(digits) <= _MOST_DIGITS else math.inf


def _check_value(value: Any) -> None:
    """Checks numbers and nesting without recursion."""
    level, num_levels = [value], 0
    while level:
        if num_levels == _MOST_LEVELS:
            raise ValueError(f"nests more than {_MOST_LEVELS} levels deep")
        num_levels += 1
        deeper = []
        for item in level:
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError("holds a number that is NaN or too large")
            if isinstance(item, dict):
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        level = deeper
