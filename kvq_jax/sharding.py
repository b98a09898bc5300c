# SPDX-License-Identifier: Apache-2.0
"""KV heads shared out over devices."""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvq_jax.base import KV, CacheSpec, CacheTransform, Implementation, Params, State
from kvq_jax.engines import Layered, Window


@dataclasses.dataclass(frozen=True)
class Sharded(CacheTransform):
    """A method of which every device keeps some KV heads.

    Heads know nothing of each other: each device runs the method on its own, kernels included,
    and nothing is communicated. Its functions must run under a mesh (`jax.set_mesh`) that has the
    axis; what they are given and return is whole, `[B, T, K, H]` of all heads.

    Example:
      method = kvq.Sharded(kvq.ott(), axis="heads")
      mesh = jax.make_mesh((4,), ("heads",))
      place = jax.tree.map(lambda s: NamedSharding(mesh, s), method.partition_specs(spec))
      with jax.set_mesh(mesh):
        state = jax.jit(method.init, static_argnums=0, out_shardings=place)(spec)

    Args:
      method: what to share out.
      axis: of the mesh; its size must divide the number of KV heads.
    """

    method: CacheTransform
    axis: str = "heads"
    pre_rope: bool = dataclasses.field(init=False)

    def __post_init__(self):
        if isinstance(self.method, Layered):
            raise ValueError("share out the methods of the layers, not all of them together")
        if isinstance(self.method, Window) and self.method.shares_heads:
            raise ValueError("heads that share outliers or a fit can't be on different devices")
        object.__setattr__(self, "pre_rope", self.method.pre_rope)

    @property
    def needs_prompt(self) -> bool:
        """Whether the method does; see `CacheTransform`."""
        return self.method.needs_prompt

    @property
    def needs_texts(self) -> bool:
        """Whether the method does; see `CacheTransform`."""
        return self.method.needs_texts

    def with_params(self, state: State, params: Params) -> State:
        """Replaces what was fitted to texts; see `CacheTransform.with_params`."""
        return self.method.with_params(state, params)

    def partition_specs(self, spec: CacheSpec) -> Any:
        """Returns a `PartitionSpec` for each array of the states of a spec."""

        def state(num_kv_heads: int) -> State:
            return jax.eval_shape(
                lambda: self.method.init(dataclasses.replace(spec, num_kv_heads=num_kv_heads))
            )

        def of_array(one: jax.ShapeDtypeStruct, two: jax.ShapeDtypeStruct) -> PartitionSpec:
            """Tells the axis of the heads by what grows with them."""
            pairs = enumerate(zip(one.shape, two.shape, strict=True))
            grown = [i for i, (x, y) in pairs if x != y]
            return PartitionSpec(*(None,) * grown[0], self.axis) if grown else PartitionSpec()

        return jax.tree.map(of_array, state(1), state(2))

    def init(self, spec: CacheSpec, layer: int | None = None) -> State:
        """Returns an empty cache; see `CacheTransform.init`."""
        return self.method.init(spec, layer)

    def capacity(self, state: State) -> int:
        """Returns the tokens a row can hold; see `CacheTransform.capacity`."""
        return self.method.capacity(state)

    def prefill(
        self,
        state: State,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        q: Float[Array, "B T N H"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> State:
        """Adds a right-padded batch of prompts; see `CacheTransform.prefill`."""
        states, heads = self._specs(state, k), PartitionSpec(None, None, self.axis)

        def prefill(state, k, v, q, lengths):
            return self.method.prefill(state, k, v, q=q, lengths=lengths)

        specs = states, heads, heads, heads, PartitionSpec()
        return self._map(prefill, specs, states)(state, k, v, q, lengths)

    def append(self, state: State, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> State:
        """Adds T tokens to every row; see `CacheTransform.append`."""
        states, heads = self._specs(state, k), PartitionSpec(None, None, self.axis)
        return self._map(self.method.append, (states, heads, heads), states)(state, k, v)

    def attend(
        self,
        state: State,
        q: Float[Array, "B T N H"],
        *,
        sm_scale: float | None = None,
        sliding_window: int | None = None,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention output of the last T tokens; see `CacheTransform.attend`."""
        heads = PartitionSpec(None, None, self.axis)

        def attend(state, q):
            return self.method.attend(
                state,
                q,
                sm_scale=sm_scale,
                sliding_window=sliding_window,
                implementation=implementation,
            )

        return self._map(attend, (self._specs(state, q), heads), heads)(state, q)

    def read(self, state: State) -> KV:
        """Returns all tokens dense; see `CacheTransform.read`."""
        return self.method.read(state)

    def exact_calls(self, num_tokens: int) -> list[int]:
        """Cuts a sequence into calls; see `CacheTransform.exact_calls`."""
        return self.method.exact_calls(num_tokens)

    def _specs(self, state: State, x: Float[Array, "B T n H"]) -> Any:
        batch_size, _, num_heads, head_dim = x.shape
        capacity = self.capacity(state)
        rope = (0.0,) * (head_dim // 2) if self.pre_rope else None  # shapes alone count
        spec = CacheSpec(batch_size, num_heads, capacity, head_dim, x.dtype, rope)
        return self.partition_specs(spec)

    def _map(self, function, in_specs, out_specs):
        # Kernels don't tell how their results vary over devices.
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
