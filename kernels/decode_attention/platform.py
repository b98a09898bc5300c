# SPDX-License-Identifier: Apache-2.0
"""On which machine some arrays are, or will be."""

from typing import Any

import jax
from jax.core import Tracer
from jax.experimental.pallas import tpu as pltpu


def is_hopper(*arrays: jax.Array) -> bool:
    """Returns whether the arrays are on a Hopper GPU; without any, whether JAX computes on one.

    Inside `jax.jit` nobody knows yet where an array will be; the default device counts.
    """
    device = _device(arrays)
    if device.platform != "gpu":
        return False
    return getattr(device, "compute_capability", "").startswith("9.")


def is_tpu(*arrays: jax.Array) -> bool:
    """Returns whether the arrays are on a TPU, or the program is being compiled for one."""
    if any(not isinstance(x, Tracer) for x in arrays):
        return _device(arrays).platform == "tpu"
    try:
        pltpu.get_tpu_info()
    except ValueError:  # says that there is none
        return False
    return True


def _device(arrays: tuple[jax.Array, ...]) -> Any:
    for x in arrays:
        if not isinstance(x, Tracer) and hasattr(x, "devices"):
            return next(iter(x.devices()))
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices()[0]
