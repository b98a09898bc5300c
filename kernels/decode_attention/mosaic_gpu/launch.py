# SPDX-License-Identifier: Apache-2.0
"""The kernel as a function of arrays: launches through Pallas."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CodedSegment, RingKV
from kvq_jax.codecs.affine import Affine
from kvq_jax.kernels.decode_attention import hopper, layouts
from kvq_jax.kernels.decode_attention.block_sizes import BlockSizes, choose
from kvq_jax.kernels.decode_attention.mosaic_gpu import program, warp
from kvq_jax.kernels.decode_attention.mosaic_gpu.problem import Memory, Problem

DTYPES = {"bfloat16": "bf16", "float16": "f16"}


def reason_against(q: Float[Array, "B T N H"], coded: CodedSegment | None) -> str | None:
    """Returns why the kernel can't serve a call, or None if it can."""
    return layouts.reason_against_call(
        q, coded, dtypes=DTYPES, layout="hopper", code=hopper.TileCode
    )


def decode_attention(
    q: Float[Array, "B T N H"],
    length: Int[Array, " B"],
    dense: KV | RingKV,
    coded: CodedSegment | None,
    key_codec: Affine | None,
    value_codec: Affine | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
    capacity: int | None = None,
    sizes: BlockSizes | None = None,
) -> Float[Array, "B T N H"]:
    """Returns attention over both segments; see `api.decode_attention`.

    Args:
      q: queries.
      length: tokens of each row.
      dense: tokens kept as they are.
      coded: tokens kept as codes, in the hopper layout.
      key_codec: of `coded.keys`.
      value_codec: of `coded.values`.
      sm_scale: factor of the scores.
      sliding_window: latest tokens that a query sees, or None.
      capacity: tokens that a row can hold, or None.
      sizes: how to cut the work; None takes what `block_sizes.choose` does.
    """
    problem = describe(
        q,
        dense,
        coded,
        key_codec,
        value_codec,
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        capacity=capacity,
    )
    if sizes is None:
        sizes = choose(problem.work)
    positions = [x for x in dense[2:] if x.size]  # of a pool there may be none
    arrays = (q, length, dense.keys, dense.values, *positions, *jax.tree.leaves(coded))
    return _call(problem, sizes, arrays)


def describe(
    q: Float[Array, "B T N H"],
    dense: KV | RingKV,
    coded: CodedSegment | None,
    key_codec: Affine | None,
    value_codec: Affine | None,
    *,
    sm_scale: float,
    sliding_window: int | None,
    capacity: int | None = None,
) -> Problem:
    """Returns the sizes of a call of `decode_attention`; of arrays only the shapes count."""
    batch_size, num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, dense_slots = dense.keys.shape[1:3]
    codes = {}
    if coded is not None and key_codec is not None and value_codec is not None:
        codes = {
            "key_bits": key_codec.bits,
            "value_bits": value_codec.bits,
            "group_size": key_codec.tile[0],
            "value_groups": max(1, head_dim // value_codec.tile[1]),
            "groups_per_block": coded.keys.words.shape[2],
            "blocks_per_row": coded.block_table.shape[1],
        }
    if isinstance(dense, RingKV):
        where = {"ring": dense_slots - dense.pool.shape[2], "positions_heads": num_kv_heads}
    else:
        where = {"ring": 0, "positions_heads": dense.positions.shape[1]}
    return Problem(
        batch_size=batch_size,
        num_tokens=num_tokens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dense_slots=dense_slots,
        **where,
        dtype=DTYPES[q.dtype.name],
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        capacity=capacity,
        **codes,
    )


def _launch_all(problem: Problem, sizes: BlockSizes, arrays: tuple[Array, ...]) -> Array:
    for launch in _launches(problem, sizes, arrays[0].dtype):
        arrays = tuple(_run(launch, arrays))
    return arrays[0]


_call = jax.jit(_launch_all, static_argnums=(0, 1))  # so that all layers share one lowering


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel: what a block of threads does, and of what size everything is.

    Attributes:
      body: from addresses of inputs and outputs in global memory, and that of shared memory.
      blocks: of threads, in clusters.
      cluster: blocks of a cluster.
      warpgroups: of 4 warps in a block.
      shared_bytes: of shared memory of a block.
      outputs: shapes of what it writes.
    """

    body: Callable[..., None]
    blocks: int
    cluster: int
    warpgroups: int
    shared_bytes: int
    outputs: tuple[jax.ShapeDtypeStruct, ...]


@functools.lru_cache(maxsize=256)
def _launches(p: Problem, sizes: BlockSizes, dtype: Any) -> list[Launch]:
    """Returns the launches of a call; each takes what the one before has written."""
    rows = p.work.rows
    out = jax.ShapeDtypeStruct((p.batch_size, p.num_tokens, p.num_q_heads, p.head_dim), dtype)
    parts = (
        jax.ShapeDtypeStruct((rows, sizes.splits, p.columns, p.head_dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, sizes.splits, p.columns, 2), jnp.float32),
    )
    memory = Memory.of(p, sizes)
    attend = Launch(
        functools.partial(program.attend, p, sizes, memory),
        blocks=math.ceil(rows / sizes.teams) * sizes.splits,
        cluster=sizes.cluster,
        warpgroups=sizes.warpgroups,
        shared_bytes=memory.total,
        outputs=(out,) if sizes.splits == sizes.cluster else parts,
    )
    if sizes.splits == sizes.cluster:
        return [attend]
    merge = Launch(
        functools.partial(program.merge, p, sizes),
        blocks=rows * p.columns,
        cluster=1,
        warpgroups=1,
        shared_bytes=0,
        outputs=(out,),
    )
    return [attend, merge]


def _run(launch: Launch, inputs: Sequence[Array]) -> Sequence[Array]:
    """Launches a kernel through Pallas."""

    def kernel(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def inline(ctx, *refs):
            del ctx
            at = [warp.address(ref) for ref in refs]
            shared = at.pop() if launch.shared_bytes else None
            launch.body(at[: len(inputs)], at[len(inputs) :], shared)

        inline(*refs)

    clusters = {}
    if launch.cluster > 1:
        clusters = {"cluster": (launch.cluster,), "cluster_names": ("split",)}
    shared = [plgpu.SMEM((launch.shared_bytes,), jnp.uint8)] if launch.shared_bytes else []
    return plgpu.kernel(
        kernel,
        out_type=launch.outputs,
        grid=(launch.blocks // launch.cluster,),
        grid_names=("block",),
        **clusters,
        num_threads=launch.warpgroups,
        thread_name="warpgroup",
        scratch_types=shared,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*inputs)
