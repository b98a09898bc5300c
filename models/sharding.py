# SPDX-License-Identifier: Apache-2.0
"""Weights shared out over devices, as `kvq_jax.Sharded` shares out the cache."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")
TABLES = ("embedding", "unembedding")


def partition_specs(decoder: Any, axis: str = "heads") -> Any:
    """Returns a `PartitionSpec` for each parameter of a decoder.

    Heads and channels of the MLP go to different devices, so that a layer sums twice over them,
    after attention and after the MLP (Shoeybi et al., arXiv 1909.08053, section 3); rows of the
    vocabulary, too.

    Args:
      decoder: a `Decoder`, or one of shapes.
      axis: of the mesh.
    """

    def of_parameter(path: tuple[Any, ...], _: Any) -> PartitionSpec:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        if any(name in COLUMNS for name in names):
            return PartitionSpec(*(None,) * ("kernel" in names), axis)
        if any(name in TABLES for name in names) or (set(names) & set(ROWS) and "kernel" in names):
            return PartitionSpec(axis)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(of_parameter, decoder)
